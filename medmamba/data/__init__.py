"""Images and labels for training and evaluation: readers, splits, leakage checks and a cache.

>>> from medmamba.data import check_leakage, make_splits, open_dataset
>>> dataset = make_splits(open_dataset("my_folder", patient_pattern=r"^(patient\\d+)_"))
>>> check_leakage(dataset)
>>> image, label = dataset.split("train")[0]
"""

from .cache import CachedDataset, cache_images
from .check import DatasetCheck, check_dataset
from .dataset import SPLITS, DatasetError, ImageDataset, Record, to_tensor
from .files import open_folder, open_zip
from .grouping import with_patients
from .hf_datasets import open_hf
from .labelled import Labelled, open_labelled
from .labels import alphabetical_permutation, order_classes
from .leakage import LeakageError, LeakageReport, check_leakage, find_leakage
from .npz import open_npz, unpack_npz
from .opening import open_dataset
from .splits import make_splits, published_split, random_split, val_from_train
from .streaming import DecodedAnew, StoredImages, StreamedDataset
from .table import open_csv
from .webdataset import open_shards

__all__ = [
    "SPLITS",
    "CachedDataset",
    "DatasetCheck",
    "DatasetError",
    "DecodedAnew",
    "ImageDataset",
    "Labelled",
    "LeakageError",
    "LeakageReport",
    "Record",
    "StoredImages",
    "StreamedDataset",
    "alphabetical_permutation",
    "cache_images",
    "check_dataset",
    "check_leakage",
    "find_leakage",
    "make_splits",
    "open_csv",
    "open_dataset",
    "open_folder",
    "open_hf",
    "open_labelled",
    "open_npz",
    "open_shards",
    "open_zip",
    "order_classes",
    "published_split",
    "random_split",
    "to_tensor",
    "unpack_npz",
    "val_from_train",
    "with_patients",
]

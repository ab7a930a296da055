"""MedMamba through torch.hub; only the dependencies need to be installed.

>>> import torch
>>> model = torch.hub.load("path/to/a/clone", "pretrained", "medmamba/bloodmnist-nano", source="local")
>>> model.predict("cell.png")
"""

dependencies = ["torch", "numpy", "PIL", "safetensors", "huggingface_hub", "tqdm"]


def pretrained(name, **options):
    """Loads a trained model in eval mode.

    Args:
        name (str): a model that comes with the repository ("medmamba/bloodmnist-nano"), one on the Hub
            ("org/name@revision"), a folder, a zip, or an fsspec address.
        options: arguments of `MedMamba.from_pretrained`, such as `revision`, `cache_dir`, `token`, `local_files_only`.
    """
    from medmamba import MedMamba

    return MedMamba.from_pretrained(name, **options)


def new(name="tiny", num_classes=1000, in_chans=3, **config):
    """Creates a model with random weights.

    Args:
        name (str): "nano", "tiny", "small", "base", "small-paper" or "base-paper".
        num_classes (int): number of classes; 0 returns features.
        in_chans (int): number of input channels.
        config: any other field of `MedMambaConfig`.
    """
    from medmamba import create_model

    return create_model(name, num_classes=num_classes, in_chans=in_chans, **config)

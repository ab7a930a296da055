"""Estimates of how long explanations take, and comparisons that grow map by map."""

import numpy as np
import pytest
from explain_cases import picture

import medmamba
from medmamba.explain import Speed, estimate_seconds, explain, iter_compare, measure_speed, methods
from medmamba.explain.cost import evaluations
from medmamba.explain.render import Map, overlay_pixels
from medmamba.explain.subject import Subject

pytest.importorskip("captum", reason='needs pip install "medmamba[explain]"')


@pytest.mark.parametrize("method", sorted(methods()))
def test_the_count_is_what_a_method_evaluates(trained, method, monkeypatch):
    counted = [0, 0]
    evaluate = Subject.__call__

    def count(self, batch):
        logits = evaluate(self, batch)
        counted[logits.requires_grad] += len(batch)
        return logits

    monkeypatch.setattr(Subject, "__call__", count)
    few = {"integrated_gradients": {"max_steps": 6, "n_steps": 6}, "smoothgrad": {"samples": 4}}
    few |= {"gradient_shap": {"samples": 4}, "feature_ablation": {"n_segments": 9, "segments": "grid"}}
    options = few.get(method, {})
    explain(trained, picture(), method, **options)
    expected = evaluations(method, trained.config.preprocess.input_size, **options)
    assert counted == pytest.approx([expected.forward, expected.gradient], abs=1 if method != "occlusion" else 2)


def test_an_estimate_follows_the_speed_and_the_checks(trained):
    speed = Speed(forward=1.0, gradient=3.0)
    names = ["saliency", "smoothgrad"]
    plain = estimate_seconds(trained, names, speed=speed)
    assert plain == {"saliency": 3.0, "smoothgrad": 76.0}
    checked = estimate_seconds(trained, names, checks=True, speed=speed)
    assert checked["saliency"] == 8 * 3 + 240 + 40  # the random orders count once
    assert checked["smoothgrad"] == 8 * 76 + 40
    measured = measure_speed(trained)
    assert 0 < measured.forward < 60 and 0 < measured.gradient < 60
    with pytest.raises(ValueError, match="unknown method 'gradcan'"):
        estimate_seconds(trained, ["gradcan"], speed=speed)


def test_a_comparison_grows_map_by_map(trained):
    seen = []
    names, wanted = ["saliency", "gradcam:stage2"], {"metrics": ["removal"]}
    found = list(iter_compare(trained, picture(), names, **wanted, progress=seen.append))
    assert [(len(c.explanations), len(c.trust)) for c in found] == [(1, 0), (2, 0), (2, 1), (2, 2)]
    assert [c.agreement.shape for c in found] == [(1, 1), (2, 2), (2, 2), (2, 2)]
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1)
    both = medmamba.explain.compare(trained, picture(), names, **wanted)
    assert np.array_equal(both.agreement, found[-1].agreement)


def test_a_map_says_how_to_read_it(trained):
    e = explain(trained, picture(), "gradcam")
    h, w = e.parameters["layer_size"]
    assert "Warmer: features that raise the score" in e.reading and f"{h}×{w} values, enlarged" in e.reading
    assert "enlarged" not in explain(trained, picture(), "saliency").reading
    assert all(m.reading for m in methods().values())


def test_an_overlay_drawn_in_bands_is_the_same(trained, monkeypatch):
    e = explain(trained, picture(), "saliency")
    values = e.map_to_draw()
    whole = overlay_pixels(e.image, values)
    monkeypatch.setattr("medmamba.explain.render._BAND", 7 * e.image.size[1])
    assert np.array_equal(overlay_pixels(e.image, Map(*values)), whole)

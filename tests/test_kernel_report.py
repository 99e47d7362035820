"""Pictures and reports of kernels: what they show, that they stand alone, and that odd kernels get one too."""

import base64
import dataclasses
import io
import math
import re

import matplotlib.image
import pytest
import torch

from harmonic_triton.losskernel import estimators, figures, report
from harmonic_triton.losskernel.about import About
from harmonic_triton.losskernel.diagnostics import Diagnostics
from harmonic_triton.losskernel.kernel import LossKernel

GROUPS = torch.arange(60) % 3


def losses(chains=4, draws=100, seed=0):
    """Three groups of samples, each with a direction of its own: ρ about 0.8 within, 0 between."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(chains, draws, 3, generator=generator)[:, :, GROUPS]
    return 2 + 0.05 * (2 * common + torch.randn(chains, draws, 60, generator=generator))


def kernel(given=None, **options):
    options = {"initial_losses": torch.full((60,), 1.9), "labels": GROUPS, **options}
    return LossKernel.from_losses(losses() if given is None else given, **options)


def pictures(page):
    """The inline images of a page as arrays, each with something on it."""
    found = [
        matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    for picture in found:
        assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.01
    return found


# --- report ------------------------------------------------------------------------------------------------------------


def test_the_report_stands_alone_and_says_which_chain_died(tmp_path):
    sick = losses()
    sick[2, 30:] = math.nan
    about = About(nbeta=10.0, step_size=1e-3, num_train=60, config={"lr": 1e-3}, fingerprint={"model": "<b>&"})
    names = [f"<i>{i}</i> & $x_{i}$" for i in range(60)]
    path = kernel(sick, about=about).report(
        tmp_path / "deep" / "report.html", method="pca", names=names, label_names=["_a$", "b", "c"], title="A < B"
    )
    page = path.read_text(encoding="utf-8")
    assert page.count("Chain 2 died at draw 30") == 2  # in the warning on top and in the diagnostics
    assert "3 of 4 alive" in page and "300 of 4 chains" in page
    assert len(pictures(page)) == 3
    outside = re.sub(r'src="data:[^"]+"', "", page)
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script""", outside)
    assert "&lt;i&gt;1&lt;/i&gt; &amp; $x_1$" in page and "<i>" not in page and "A &lt; B" in page
    assert "&lt;b&gt;&amp;" in page and "nan" not in outside.lower()


def test_a_healthy_report_has_no_warning_and_lists_neighbours(tmp_path):
    page = kernel().report(tmp_path / "report.html", method="pca", samples=[7], num_neighbors=5).read_text()
    assert "died" not in page and "4 of 4 alive" in page and "class=warning" not in page
    ((row,),) = [re.findall(r"<tr><td><code>7</code></td>.*?</tr>", page)]
    neighbours = [int(j) for j in re.findall(r"<code>(\d+)</code>", row)[1:]]
    assert len(neighbours) == 5 and all(j % 3 == 7 % 3 for j in neighbours)
    excluded = kernel().report(tmp_path / "other.html", method="pca", samples=[7], exclude_same=True).read_text()
    ((row,),) = [re.findall(r"<tr><td><code>7</code></td>.*?</tr>", excluded)]
    assert all(int(j) % 3 != 7 % 3 for j in re.findall(r"<code>(\d+)</code>", row)[1:])
    assert "pairs with one label left out" in excluded and "pairs with one label left out" not in page


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(lambda: kernel(keep="traces"), id="traces"),
        pytest.param(lambda: kernel(labels=None, initial_losses=None), id="bare"),
        pytest.param(lambda: kernel(torch.cat([losses()[..., :-1], torch.zeros(4, 100, 1)], 2)), id="constant"),
        pytest.param(lambda: kernel(losses(1, 3)), id="one chain of three draws"),
        pytest.param(lambda: kernel(labels=torch.arange(60)), id="a label a sample"),
        pytest.param(lambda: LossKernel.from_losses(losses()[..., :4]), id="four samples"),
        pytest.param(lambda: LossKernel.from_losses(losses() - 2), id="negative losses"),
    ],
)
def test_odd_kernels_get_a_report(odd, tmp_path):
    page = odd().report(tmp_path / "report.html", method="pca").read_text()
    assert len(pictures(page)) == 3
    assert not re.search(r"\b(nan|inf)\b", re.sub(r'src="data:[^"]+"', "", page))


def test_bad_arguments_are_named(tmp_path):
    path = tmp_path / "report.html"
    for options, words in (
        ({"names": ["a"]}, "names must hold 60 strings, one a sample, got 1"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be integers of shape \(60,\)"),
        ({"embedding": torch.zeros(60, 3)}, r"embedding must be \(60, 2\)"),
        ({"method": "tsne"}, "'umap' or 'pca', got 'tsne'"),
    ):
        with pytest.raises(ValueError, match=words):
            kernel().report(path, **options)
    assert not path.exists()


# --- figures -----------------------------------------------------------------------------------------------------------


def test_samples_are_sorted_by_label_or_by_cluster(monkeypatch):
    by_label = figures.sorted_samples(kernel(), GROUPS)
    assert by_label.sort().values.tolist() == list(range(60))
    assert GROUPS[by_label].unique_consecutive().tolist() == [0, 1, 2]
    by_cluster = figures.sorted_samples(kernel(), None)
    assert by_cluster.sort().values.tolist() == list(range(60))
    assert len(GROUPS[by_cluster].unique_consecutive()) == 3  # the groups are found without their labels
    monkeypatch.setattr(figures, "SHOWN", 12)
    some = figures.sorted_samples(kernel(), GROUPS)
    assert GROUPS[some].bincount().tolist() == [4, 4, 4] and len(some.unique()) == 12
    assert len(figures.sorted_samples(kernel(), None).unique()) == 12


def test_the_heatmap_shows_the_sorted_correlations():
    figure = figures.overview(kernel(), method="pca")
    image = figure.axes[0].images[0].get_array()
    order = figures.sorted_samples(kernel(), GROUPS)
    torch.testing.assert_close(torch.as_tensor(image.data), kernel().correlation[order][:, order], atol=1e-6, rtol=0)
    assert image[:20, :20].mean() > 0.7 and abs(image[:20, 20:].mean()) < 0.1


def test_the_chains_figure_marks_the_dead():
    sick = losses()
    sick[1, 50:] = math.inf
    axis = figures.chains_figure(kernel(sick)).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "chain 0", "chain 2", "chain 3", "chain 1 died", "at w*, the trained weights",
    ]  # fmt: skip
    living = [line for line in axis.lines if str(line.get_label()) in ("chain 0", "chain 2", "chain 3")]
    assert len({line.get_color() for line in living}) == len({line.get_linestyle() for line in living}) == 3
    assert all(line.get_linewidth() >= 1.5 and (line.get_alpha() or 1) == 1 for line in living)


def test_many_chains_are_one_kind_of_line_without_a_legend_each():
    axis = figures.chains_figure(kernel(losses(chains=12, draws=8))).axes[0]
    assert len([line for line in axis.lines if line.get_color() == figures.BLUE]) == 12
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["at w*, the trained weights"]


@pytest.mark.parametrize("count", [3, 30, 61])
def test_no_line_lies_over_the_heatmap_and_names_do_not_collide(count):
    """One wide label and narrow ones beside it: a name wants room."""
    labels = torch.arange(count).repeat_interleave(torch.tensor([3000 // count] + [1] * (count - 1)))
    big = LossKernel.from_losses(losses()[:, :, torch.arange(len(labels)) % 60], labels=labels)
    figure = figures.overview(big, method="pca")
    figure.canvas.draw()
    axis = figure.axes[0]
    assert not axis.lines and not axis.collections
    assert len(axis.get_yticks(minor=True)) == len(axis.get_xticks(minor=True)) == (count - 1 if count <= 60 else 0)
    boxes = [label.get_window_extent() for label in axis.get_yticklabels()]
    assert boxes and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_dots_of_each_label_have_a_colour_and_a_marker_and_the_legend_lies_beside_them():
    figure = figures.overview(kernel(labels=torch.arange(60) % 10), method="pca")
    figure.canvas.draw()
    axis = figure.axes[1]
    dots = [collection for collection in axis.collections if len(collection.get_offsets())]
    assert len(dots) == 10 == len({dot.get_paths()[0].vertices.tobytes() for dot in dots})
    assert len({tuple(dot.get_facecolor()[0]) for dot in dots[:8]}) == 8
    legend = axis.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [str(i) for i in range(10)]
    assert not legend.get_window_extent().overlaps(axis.get_window_extent())
    many = figures.overview(kernel(labels=torch.arange(60) % 20), method="pca")
    assert any(axis.get_ylabel() == "place of its label in their order" for axis in many.axes)  # its colour bar


def test_labels_that_are_not_the_kernels_own_are_called_groups():
    """The diagnostics speak of the kernel's labels, the pictures of those given: one word for both contradicted itself."""
    assert figures.kind_of(kernel(), GROUPS) == figures.kind_of(kernel(labels=None), GROUPS) == "label"
    assert figures.kind_of(kernel(), torch.arange(60) % 2) == "group"
    texts = figures.correlations_figure(kernel(), torch.arange(60) % 2).axes[0].get_legend().get_texts()
    assert [text.get_text().partition(",")[0] for text in texts] == ["other pairs", "same group"]
    styles = {patch.get_linestyle() for patch in figures.correlations_figure(kernel(), GROUPS).axes[0].patches}
    assert len(styles) == 2


# --- words -------------------------------------------------------------------------------------------------------------


def test_the_report_explains_its_symbols():
    text = report.summary(kernel()) + report.diagnostics_section(kernel())
    for words in (
        "w* are the trained weights", "about half the number of directions", "how much single losses move",
        "as so many samples would", "The pull back to w*", "1 where they do", "The likeness of the kernels of two halves",
    ):  # fmt: skip
        assert words in text


def test_the_report_says_what_to_conclude():
    good = report.conclusion(kernel(losses(draws=400)))
    assert "<b>The draws can be trusted:</b>" in good and "Not to be relied on" not in good
    assert re.search(r"Mean correlation of pairs: same label 0\.[78]\d\d, others -?0\.0", good)
    drifting = torch.randn(4, 30, 60, generator=torch.Generator().manual_seed(0)).cumsum(1) + 9
    bad = report.conclusion(kernel(drifting))
    assert "<b>Not to be relied on yet.</b> split R̂" in bad and "can be trusted:" not in bad
    few = report.conclusion(kernel(losses(1, 3), initial_losses=None))
    assert "<b>Not known whether the draws suffice</b>" in few and "can be trusted:" not in few


def test_plot_writes_a_picture(tmp_path):
    kernel().plot(tmp_path / "plot.png", method="pca")
    assert matplotlib.image.imread(tmp_path / "plot.png").std() > 0.01


# --- embeddings --------------------------------------------------------------------------------------------------------


def nearest(points, k=5):
    return torch.cdist(points, points).fill_diagonal_(math.inf).topk(k, largest=False).indices


@pytest.mark.slow
def test_umap_keeps_the_groups_together_unless_their_edges_are_removed():
    whole = kernel(losses(draws=400))
    together = whole.embed(num_neighbors=10)
    assert together.shape == (60, 2) and together.dtype == torch.float32
    assert estimators.knn_purity(nearest(together), GROUPS) > 0.95  # a third by chance
    assert torch.equal(together, whole.embed(num_neighbors=10))
    apart = whole.embed(num_neighbors=10, exclude_same=True)
    assert estimators.knn_purity(nearest(apart), GROUPS) < 0.7
    # samples with fewer admissible neighbours than asked for still get a place
    assert whole.embed(num_neighbors=5, exclude_same=torch.where(torch.arange(60) < 2, 1, 0)).isfinite().all()


def test_pca_is_that_of_the_centred_correlations():
    rho = kernel().correlation.double()
    centre = torch.eye(60, dtype=torch.float64) - 1 / 60
    values, vectors = torch.linalg.eigh(centre @ rho @ centre)
    points = kernel().embed("pca", dimensions=2).double()
    torch.testing.assert_close(
        points @ points.T, (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T, atol=1e-4, rtol=0
    )
    assert estimators.knn_purity(nearest(points), GROUPS) == 1.0
    with pytest.raises(ValueError, match="'umap' or 'pca'"):
        kernel().embed("tsne")


# --- verdicts: what the words say is what the numbers show ----------------------------------------------------------------

DIAGNOSTICS = Diagnostics(
    num_chains=4, num_draws=400, r_hat_mean_loss=1.0, r_hat=torch.ones(60).double(), autocorrelation_time_mean_loss=1.0,
    autocorrelation_time=torch.ones(60).double(), split_half_cka=0.95, initial_loss=1.0, excess_loss=torch.ones(4).double(),
    dead={}, skipped={}, constant_samples=0, step_size=0.1, stability_bound=1.0, confound=None,
)  # fmt: skip


def verdict(name, **changes):
    (found,) = [v for v in dataclasses.replace(DIAGNOSTICS, **changes).verdicts() if v.name.startswith(name)]
    return found


def all_at(value):
    return torch.full((60,), value, dtype=torch.float64)


def test_a_row_names_what_its_numbers_are_of():
    """ "0.998; above 1.01" was the mean loss's number beside the samples' verdict."""
    found = verdict("split R̂", r_hat_mean_loss=0.998, r_hat=all_at(1.2))
    assert found.name == "split R̂" and found.value == "mean loss 0.998; median sample 1.200, 95 % below 1.200"
    assert found.words.startswith("R̂ of the median sample, 1.200, is above 1.01") and found.good is False
    some = torch.cat([torch.ones(50), torch.full((10,), 1.4)]).double()
    assert verdict("split R̂", r_hat=some).words.endswith("but for single samples.")


@pytest.mark.parametrize("name", ["split R̂", "autocorrelation time"])
@pytest.mark.parametrize("of_mean", [0.998, 1.0, 1.0099, 1.0104, 1.0106, 1.5])
@pytest.mark.parametrize("of_samples", [0.998, 1.0099, 1.0104, 1.0106, 1.5, math.nan])
def test_what_is_called_above_a_limit_is_shown_above_it(name, of_mean, of_samples):
    """And all that is shown above it is called so; digits that are not shown decide nothing."""
    limit, scale = (1.01, 1.0) if name == "split R̂" else (6.0, 5.95)
    of_mean, of_samples = (x if scale == 1 else 6 + 10 * (x - 1.01) for x in (of_mean, of_samples))
    field = "r_hat" if name == "split R̂" else "autocorrelation_time"
    found = verdict(name, **{f"{field}_mean_loss": of_mean, field: all_at(of_samples)})
    if name.startswith("auto") and math.isnan(of_samples):
        assert found.good is None and "Needs" in found.words
        return
    shown = [float(number) for number in re.findall(r"\d+\.\d+", found.value.partition(", 95")[0])]
    assert found.good == (max(shown) <= limit)
    said = re.search(r"(?:R̂|The time) (.*), is above ([\d.]+)", found.words)
    if found.good:
        assert said is None
        return
    assert float(said[2]) == limit
    named = [float(number) for number in re.findall(r"\d+\.\d+", said[1])]
    assert named == [number for number in shown if number > limit]
    assert ("of the mean loss" in said[1]) == (shown[0] > limit)


@pytest.mark.parametrize(
    ("cka", "noise_tau", "good", "words"),
    [
        (0.95, 1.0, True, "give the same kernel"),
        (0.85, 1.0, False, "Below 0.9"),
        (0.8999, 1.0, True, "give the same kernel"),  # shown as 0.900
        (0.95, 0.01, False, "share nothing"),  # 0.997 by the diagonals alone
        (0.5, 0.01, False, "Below 0.9"),
    ],
)
def test_split_half_words(cka, noise_tau, good, words):
    found = verdict("split-half", split_half_cka=cka, autocorrelation_time=all_at(noise_tau))
    assert found.good == good and words in found.words
    cka, noise = (float(number) for number in re.findall(r"\d\.\d{3}", found.value))
    assert good == (cka >= max(0.9, noise))


@pytest.mark.parametrize(
    ("excess", "initial", "good", "words"),
    [
        ([1.0, 1.1, 0.9, 1.0], 1.0, True, "100 % of the loss"),
        ([1.0, 1.1, 0.9, 5.0], 1.0, False, "Far above the median, 1: chain 3 sampled elsewhere"),
        ([1.0, 1.1, 1.0, 5.0, 6.0], 1.0, False, "chains 3, 4 sampled elsewhere"),
        ([-1.0, -1.1, -0.9, 2.0], 1.0, False, "Far above the median, -1: chain 3"),
        ([-1.0, -1.1, -0.9, -1.0], 1.0, None, "lower losses"),
        ([1.0, 1.0], 0.0, None, "not above 0"),
        ([1.0, 1.0], -2.0, None, "not above 0"),
        ([4.0, 4.0], 1.0, False, "4 times the loss"),
        ([1e-3, 1e-3], 1.0, False, "hardly moves"),
    ],
)
def test_excess_words(excess, initial, good, words):
    found = verdict("excess", excess_loss=torch.tensor(excess, dtype=torch.float64), initial_loss=initial)
    assert found.good is good and words in found.words and "inf" not in found.words + found.value


@pytest.mark.parametrize(
    ("step", "bound", "good", "words"),
    [
        (0.1, 1.0, True, "10 % of the bound"),
        (0.4, 1.0, True, "bias of 67 %"),
        (0.9, 1.0, False, "bias of 900 % of the variance in the stiffest direction. Smaller"),
        (1.0, 1.0, False, "unstable"),
        (0.1, 0.0, False, "not finite"),
        (0.1, math.inf, None, "No curvature"),
        (0.1, math.nan, None, "not computed"),
    ],
)
def test_step_size_words(step, bound, good, words):
    found = verdict("step size", step_size=step, stability_bound=bound)
    assert found.good is good and words in found.words and "inf" not in found.value


@pytest.mark.parametrize(
    ("same", "other", "words"), [(0.1, 0.05, "little more"), (0.1, 0.5, "no more"), (0.5, 0.1, "leave them out")]
)
def test_confound_words(same, other, words):
    assert words in verdict("same-label", confound=estimators.SameLabelConfound(same, other)).words


@pytest.mark.parametrize("labels", [GROUPS - 1, GROUPS + 1, torch.where(GROUPS == 0, 7, GROUPS)])
def test_labels_without_a_name_are_refused(labels, tmp_path):
    """-1 would be the last name: a sample without a label would be shown as one of the last class."""
    names = ["a", "b", "c"]
    for call in (figures.overview, lambda kernel, **options: kernel.report(tmp_path / "report.html", **options)):
        with pytest.raises(
            ValueError, match=rf"labels 0 ... 2, and labels hold {int(labels.min())} ... {int(labels.max())}"
        ):
            call(kernel(), labels=labels, label_names=names, method="pca")
        with pytest.raises(ValueError, match="label_names needs labels"):
            call(kernel(labels=None), label_names=names, method="pca")
    assert not (tmp_path / "report.html").exists()
    page = kernel().report(tmp_path / "report.html", labels=labels, method="pca")  # numbers need no names
    assert page.exists()


@pytest.mark.parametrize("samples", [[-1], [60], torch.tensor([0, -60])])
def test_neighbours_are_asked_for_by_number(samples):
    with pytest.raises(ValueError, match="samples must lie between 0 and m - 1 = 59"):
        kernel().neighbor_table(samples, names=[str(i) for i in range(60)])
    with pytest.raises(ValueError, match="k must be at least 1"):
        kernel().neighbor_table([0], 0)

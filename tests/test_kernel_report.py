"""Pictures and reports of kernels: what they show, that they stand alone, and that odd kernels get one too."""

import base64
import io
import math
import re

import matplotlib.image
import pytest
import torch

from harmonic_triton import estimators, kernel_report
from harmonic_triton.loss_kernel import About, LossKernel

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
    by_label = kernel_report.sorted_samples(kernel(), GROUPS)
    assert by_label.sort().values.tolist() == list(range(60))
    assert GROUPS[by_label].unique_consecutive().tolist() == [0, 1, 2]
    by_cluster = kernel_report.sorted_samples(kernel(), None)
    assert by_cluster.sort().values.tolist() == list(range(60))
    assert len(GROUPS[by_cluster].unique_consecutive()) == 3  # the groups are found without their labels
    monkeypatch.setattr(kernel_report, "SHOWN", 12)
    some = kernel_report.sorted_samples(kernel(), GROUPS)
    assert GROUPS[some].bincount().tolist() == [4, 4, 4] and len(some.unique()) == 12
    assert len(kernel_report.sorted_samples(kernel(), None).unique()) == 12


def test_the_heatmap_shows_the_sorted_correlations():
    figure = kernel_report.overview(kernel(), method="pca")
    image = figure.axes[0].images[0].get_array()
    order = kernel_report.sorted_samples(kernel(), GROUPS)
    torch.testing.assert_close(torch.as_tensor(image.data), kernel().correlation[order][:, order], atol=1e-6, rtol=0)
    assert image[:20, :20].mean() > 0.7 and abs(image[:20, 20:].mean()) < 0.1


def test_the_chains_figure_marks_the_dead():
    sick = losses()
    sick[1, 50:] = math.inf
    axis = kernel_report.chains_figure(kernel(sick)).axes[0]
    assert "chain 1 died" in axis.get_legend_handles_labels()[1]
    assert len([line for line in axis.lines if line.get_color() == kernel_report.BLUE]) == 3


def test_plot_writes_a_picture(tmp_path):
    kernel().plot(tmp_path / "plot.png", method="pca")
    assert matplotlib.image.imread(tmp_path / "plot.png").std() > 0.01


# --- embeddings --------------------------------------------------------------------------------------------------------


def nearest(points, k=5):
    return torch.cdist(points, points).fill_diagonal_(math.inf).topk(k, largest=False).indices


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

"""The module paths of version 0.1 give their names for one version more, and say where those are now."""

import importlib
import types
import warnings

import fresh
import pytest

import harmonic_triton as ht
from harmonic_triton import _moved

NAMES = {  # every public name of the old modules
    "covariance": """
        BUFFER DRIFT LARGEST CONSTANT PRECISIONS CovarianceResult StreamingCovariance loss_covariance
    """,
    "estimators": """
        BLOCK PrincipalComponents SameLabelConfound MemorizationAUC correlation_distance cka cka_of_factors
        cka_of_chunks alignment principal_components pc1 roc_auc unsigned_auc memorization_auc same_label_confound
        knn_purity taxonomic_lift population empirical_variance singular_fluctuation llc bif gelman_rubin
        autocorrelation_time split_chains split_half_cka standardised umap_layout needs blocks square neighbor_matrix
        sample_labels
    """,
    "losses": """
        per_sample_cross_entropy classification_loss regression_loss token_loss sequence_loss harmonic_head_loss
    """,
    "sgld": """
        KIND MEND METHODS VMAP_FLOPS VMAP_CHAINS CHECK_EVERY SGLDConfig Draws Sampler stability_bound sample_losses
    """,
    "traces": """
        DTYPES LARGEST_LOSS CHUNK SMALLEST_SUM NOISE Samples Neighbors LossTraces
    """,
    "tuning": """
        SHARE_OF_BOUND CLOSE LONGEST PROBE_SAMPLES Trial TuningResult tune
    """,
    "loss_kernel": """
        DENSE_BYTES SUBSET About LossKernel Neighborhood loss_kernel standardised_chunks
    """,
    "kernel_cli": """
        REQUIRED OPTIONAL CONTRACT PROBE QUICK STABILITY PROBE_FILE LONG EntryPointError Task resolve load checked
        check_sizes group_correlation write_neighbors write_groups one_line add_arguments main run need_extras
        count_samples configured given_fields resumed write_probe expected_seconds announcement tuned clear
        is_first_process write
    """,
    "doctor": """
        version_line backend_lines main
    """,
    "verify": """
        DTYPES LOSS_LEVELS LOSS_BOUND GRADIENT_BOUND REFERENCE_ENTRIES DENSE_WORK TRUTH_WORK Case Outcome probes
        make_inputs distance_for_loss length_for_loss truth row_error prepared run_case default_shapes cases
        parse_shape add_arguments main
    """,
}


def test_every_old_path_is_listed():
    assert set(NAMES) == set(_moved.PATHS)


@pytest.mark.parametrize("old", NAMES)
def test_an_old_path_gives_its_names_with_a_warning(old):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = importlib.import_module(f"harmonic_triton.{old}")  # to import it is no offence yet
    for name in NAMES[old].split():
        with pytest.warns(
            DeprecationWarning, match=rf"harmonic_triton\.{old}\.{name} is now harmonic_triton\."
        ) as caught:
            value = getattr(module, name)
        assert caught[0].filename == __file__  # where the old path is used, not where it is mended
        assert value is getattr(*_moved.find(old, name))


def test_from_an_old_path_import_works():
    with pytest.warns(DeprecationWarning, match="SGLDConfig is now"):
        from harmonic_triton.sgld import SGLDConfig
    with pytest.warns(DeprecationWarning, match="gelman_rubin is now"):
        from harmonic_triton.estimators import gelman_rubin  # which has moved away from most of its neighbours
    assert SGLDConfig is ht.SGLDConfig and callable(gelman_rubin)


def test_loss_kernel_stays_the_function():
    """And its old module is found by its path in a process that asks for it first."""
    assert isinstance(ht.loss_kernel, types.FunctionType)
    code = (
        "import harmonic_triton.loss_kernel, harmonic_triton as ht\n"
        "from harmonic_triton.loss_kernel import LossKernel\n"
        "assert callable(ht.loss_kernel) and LossKernel is ht.LossKernel"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


def test_a_name_that_never_was_is_told_where_it_was_looked_for():
    import harmonic_triton.sgld as old

    with pytest.raises(AttributeError, match=r"had no 'hmc', nor is it in .*losskernel\.sampling\.sampler"):
        old.hmc  # noqa: B018

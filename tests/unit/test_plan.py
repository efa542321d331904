import pytest

from benchmarks.cost_model import Case, meta_model, plan, saved_bytes
from benchmarks.plan import DOCUMENT, parse_case, with_tables
from ds_roberta.config import model_config
from ds_roberta.model.objectives import MaskedLM
from ds_roberta.training.checkpoint_writer import owners


@pytest.mark.parametrize("model", ["tiny", "small"])
def test_the_plan_counts_the_models_parameters(model):
    case = Case(model, 8)
    expected = sum(parameter.numel() for parameter in MaskedLM(case.config).parameters())
    assert plan(case).parameters == expected == sum(p.numel() for p in meta_model(case.config).parameters())


@pytest.mark.parametrize("model", ["nano", "large"])
def test_saved_activations_of_a_layer_are_those_counted_by_hand(model):
    """34 bytes a token and hidden unit as in Korthikanti et al. (2022, arXiv:2205.05198, section 4.1), without the
    attention matrix, of which only sums of rows are saved."""
    length = 64
    config = model_config(model, 1_000, length)
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    masked = 10  # the ceiling of 15%
    expected = layers * length * (34 * hidden + 4 * heads + 2 * 2 * 4)  # two normalisations: mean and deviation
    expected += length * (3 * hidden + 2 * 4)  # embeddings: the sum before its normalisation, and dropout's mask
    expected += masked * (4 * 2 * hidden + 2 * 1_000)  # head
    found = (saved_bytes(config, length, 9) - saved_bytes(config, length, 1)) / 8  # labels are rounded up to 16
    assert found == pytest.approx(expected, rel=0.01)
    assert found >= expected


@pytest.mark.parametrize("number_checkpoints", [1, 5, 12])
def test_a_recomputed_layer_keeps_its_input_and_one_at_a_time_has_all_its_activations(number_checkpoints):
    length = 64
    config = model_config("base", 1_000, length)
    layer = length * (34 * config.hidden_size + 4 * config.num_attention_heads + 16)

    def a_sequence(number):
        return saved_bytes(config, length, 2, number) - saved_bytes(config, length, 1, number)

    inputs = number_checkpoints * 2 * length * config.hidden_size
    assert a_sequence(number_checkpoints) == pytest.approx(
        a_sequence(0) - (number_checkpoints - 1) * layer + inputs, rel=0.01
    )


def test_recomputation_takes_a_third_of_the_layers_operations_again():
    kept, recomputed = plan(Case("base", 8)), plan(Case("base", 8, number_checkpoints=12))
    assert recomputed.largest_micro_batch > 2 * kept.largest_micro_batch
    assert 1.2 < recomputed.compute_seconds / kept.compute_seconds < 4 / 3


def test_a_batch_is_planned_as_the_run_would():
    small, large = plan(Case("large", 8)), plan(Case("large", 4_096, train_batch_size=10_000))
    assert small.batch.accumulation_steps * small.batch.micro_batch_size * 8 >= 8_192
    assert small.batch.micro_batch_size <= small.largest_micro_batch
    assert large.batch.empty_places == 3 * 4_096 - 10_000
    assert "2,288 empty places" in large.verdict
    assert plan(Case("large", 8, gpu="v100-32", precision="fp16")).largest_micro_batch < small.largest_micro_batch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "0"), "at least 1"),
        (("--utilisation", "0"), "a number above 0"),
        (("--number_checkpoints", "-1"), "a whole number"),
        (("--model", "tiny", "--number_checkpoints", "5"), "the model has 4 layers; give no more"),
        (("--utilisation", "50"), "--utilisation 50 is a share: give at most 1"),
        (("--max_seq_length", "2"), "--max_seq_length 2: the least is 3"),
        (("--vocab_size", "5"), "--vocab_size 5: the least is 6"),
    ],
)
def test_what_no_run_can_have_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_case(words)
    assert (ended.value.code, message in capsys.readouterr().err) == (2, True)


def test_what_does_not_fit_is_given_remedies_that_are_left():
    long = {"max_seq_length": 8_192, "gpu": "l4"}
    assert "--number_checkpoints 24, or stage 2 or 3" in plan(Case("large", 1, zero_stage=1, **long)).verdict
    assert "--number_checkpoints 24, or stage 3" in plan(Case("large", 1, zero_stage=2, **long)).verdict
    recomputed = plan(Case("large", 1, zero_stage=3, number_checkpoints=24, **long | {"max_seq_length": 300_000}))
    assert recomputed.verdict == "does not fit: fewer layers, or a shorter sequence"


def test_ranks_share_a_checkpoint_evenly():
    sizes = [9, 5, 4, 3, 3, 2, 1]
    assert owners(sizes, 3) == [0, 1, 2, 2, 1, 2, 1]
    assert owners(sizes, 1) == [0] * 7
    assert owners(sizes, 100) == list(range(7))


def test_the_documents_tables_are_what_the_plan_says_now():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_tables(text) == text, "regenerate them: python -m benchmarks.plan --write"

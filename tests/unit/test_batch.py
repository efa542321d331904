import pytest

from ds_roberta.training.micro_batch import BatchPlan


def exhaustive(train_batch_size, largest, world_size):
    """The best plan by trying every size: fewest empty places within 9/8 of the fewest steps, then fewest steps."""
    plans = [BatchPlan(train_batch_size, size, world_size) for size in range(1, largest + 1)]
    fewest = min(plan.accumulation_steps for plan in plans)
    plans = [plan for plan in plans if 8 * plan.accumulation_steps <= 9 * fewest]
    return min(plans, key=lambda plan: (plan.empty_places, plan.accumulation_steps))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 64])
def test_the_plan_computes_the_fewest_rows_in_hardly_more_micro_steps(world_size):
    for train_batch_size in (1, 2, 7, 64, 100, 255):
        for largest in (1, 2, 3, 10, 33, 300):
            plan = BatchPlan.fit(train_batch_size, largest, world_size)
            best = exhaustive(train_batch_size, largest, world_size)
            assert (plan.accumulation_steps, plan.empty_places) == (best.accumulation_steps, best.empty_places)
            assert 1 <= plan.micro_batch_size <= largest
            places = plan.micro_batch_size * plan.accumulation_steps * world_size
            assert places - plan.empty_places == train_batch_size
            assert 0 <= plan.empty_places < places


def test_a_slightly_smaller_micro_batch_that_divides_computes_no_empty_place():
    plan = BatchPlan.fit(8192, 35, 1)  # 34 x 241 would compute two rows more, in as good as the same time
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.empty_places) == (32, 256, 0)


def test_a_prime_share_is_not_computed_row_by_row():
    plan = BatchPlan.fit(127, 16, 1)
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.empty_places) == (16, 8, 1)


def test_8192_on_3_processes():
    plan = BatchPlan.fit(8192, 32, 3)
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.empty_places) == (32, 86, 64)
    assert str(plan) == (
        "8192 sequences a step = 32 (micro-batch) x 86 (accumulation) x 3 (processes) - 64 empty places"
    )


def test_a_batch_that_divides_has_no_empty_places():
    plan = BatchPlan.fit(8192, 32, 8)
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.empty_places) == (32, 32, 0)
    assert "empty" not in str(plan)


def test_more_processes_than_sequences_leave_some_idle():
    plan = BatchPlan.fit(2, 32, 8)
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.empty_places) == (1, 1, 6)

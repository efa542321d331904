import os
import signal

import pytest

from ds_roberta.distributed import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_request_and_handlers_are_put_back(solo_ranks, number):
    before = signal.getsignal(number)
    with StopRequest(solo_ranks) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.agreed()
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_at_once(solo_ranks):
    with StopRequest(solo_ranks):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_launchers_sigterm_is_not_a_second_ctrl_c(solo_ranks):
    with StopRequest(solo_ranks) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()


def test_one_process_stops_all(on_ranks):
    def body(ranks):
        stop = StopRequest(ranks)  # handlers belong to the main thread, so the signal is delivered by hand
        before = stop.agreed()
        if ranks.rank == 1:
            stop._receive(signal.SIGUSR1, None)
        return before, stop.agreed()

    assert on_ranks(3, body) == [(False, True)] * 3

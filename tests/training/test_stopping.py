"""Reasons to stop, and how ranks agree on one."""

import time

import torch.distributed as dist

from megatron_bert_tp.config.duration import seconds_of
from megatron_bert_tp.parallel.agreement import Agreement
from megatron_bert_tp.training.stopping import TIME_IS_UP, Deadline, Stopping
from tests.support import TIMEOUT

CALM = {"step_seconds": 0.0, "save_seconds": 0.0}


def agreed(requests: list[str | None], writing: list[bool], limits: list[float]) -> tuple[str | None, bool]:
    rank = dist.get_rank()
    deadline = Deadline(time.monotonic(), limits[rank])
    stopping = Stopping(lambda: requests[rank], Agreement.of_world(TIMEOUT), deadline=deadline)
    return stopping.agree(is_writing=writing[rank], **CALM)


def test_one_rank_is_enough_to_stop_all_and_one_writer_enough_to_wait(ranks):
    idle = [False] * 3
    for requests, truth in [
        ([None, None, None], None),
        ([None, "SIGTERM", None], "SIGTERM"),
        (["SIGUSR1", None, "SIGINT"], "SIGINT"),
        ([None, None, "something of a later version"], "another request"),
    ]:
        assert ranks.run(3, agreed, requests, idle, [100] * 3) == [(truth, False)] * 3
    assert ranks.run(3, agreed, [None] * 3, [False, False, True], [100] * 3) == [(None, True)] * 3
    assert ranks.run(3, agreed, [None] * 3, idle, [100, 0, 100]) == [(TIME_IS_UP, False)] * 3


def test_a_run_stops_while_two_steps_and_a_save_and_a_half_still_fit():
    """Of 100 s, 60 are over: 2 x 5 s + 1.5 x 20 s are just what is left."""
    deadline = Deadline(started=1000.0, seconds=100.0)
    assert deadline.is_near(1060.0, step_seconds=5.0, save_seconds=20.0)
    assert not deadline.is_near(1059.9, step_seconds=5.0, save_seconds=20.0)


def test_durations_as_people_write_them():
    right = {"3h50m": 13800, "45m": 2700, "90s": 90, "1d12h": 129600, " 2h ": 7200}
    assert {text: seconds_of(text) for text in right} == right
    wrong = ["", "0s", "50", "3h50", "50m3h", "3 h", "-3h", "3.5h", "h", "٣h", "1e3s", "3h 50m"]
    assert [text for text in wrong if seconds_of(text) is not None] == []

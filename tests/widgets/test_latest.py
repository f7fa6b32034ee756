"""The latest job: it is always done, what it replaces is stopped, and no thread is left over."""

import threading
import time

import pytest

from repe.widgets.latest import Latest

PAUSE = 0.02
NEVER = 3600  # a pause that no test sees the end of
PATIENCE = 60  # seconds, for what takes next to none


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "repe-latest"]


def test_of_many_jobs_that_come_within_the_pause_only_the_last_is_done():
    done = []
    latest = Latest(lambda job, _: done.append(job), NEVER)
    for job in range(19):
        latest.ask(job)
    with latest._changed:
        latest.pause = 0
        latest.ask(19)
    assert latest.wait(PATIENCE)
    assert done == [19]


def test_a_new_job_stops_the_one_that_runs():
    ends = []

    def run(job, is_stopped):
        until(lambda: is_stopped() or job == "last")
        ends.append((job, is_stopped()))

    latest = Latest(run, PAUSE)
    latest.ask("first")
    until(lambda: latest._job is None)
    latest.ask("last")
    assert latest.wait(PATIENCE)
    assert ends == [("first", True), ("last", False)]


def test_the_last_job_is_done_whoever_asks_and_whenever():
    done = []
    latest = Latest(lambda job, _: done.append(job), pause=0.0)

    def ask():
        for job in range(300):
            latest.ask(job)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    latest.ask("last")
    assert latest.wait(PATIENCE)
    assert done[-1] == "last"


def test_there_is_a_thread_only_while_there_is_something_to_do():
    until(lambda: not threads())
    go_on = threading.Event()
    latest = Latest(lambda job, _: go_on.wait(PATIENCE), PAUSE)
    assert not threads()
    latest.ask(1)
    assert len(threads()) == 1
    go_on.set()
    assert latest.wait(PATIENCE)
    until(lambda: not threads())


@pytest.mark.parametrize("end", ["stop", "close"])
def test_when_stop_returns_nothing_runs_or_waits(end):
    until(lambda: not threads())
    ran = []

    def run(job, is_stopped):
        ran.append(job)
        until(is_stopped)
        time.sleep(0.05)

    latest = Latest(run, PAUSE)
    latest.ask("runs")
    until(lambda: ran)
    latest.ask("waits")
    getattr(latest, end)()
    assert not threads()
    assert ran == ["runs"]


def test_stop_says_whether_there_was_anything_to_stop():
    latest = Latest(lambda job, is_stopped: until(is_stopped), PAUSE)
    assert not latest.stop()
    latest.ask(1)
    assert latest.stop()


def test_after_close_nothing_is_done():
    done = []
    latest = Latest(lambda job, _: done.append(job), PAUSE)
    latest.close()
    latest.ask(1)
    assert latest.wait(PATIENCE)
    assert done == []


def test_wait_gives_up_in_time():
    latest = Latest(lambda job, is_stopped: until(is_stopped), PAUSE)
    latest.ask(1)
    assert not latest.wait(0.05)
    latest.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_a_job_that_fails_the_next_is_done():
    done = []

    def run(job, _):
        if job == "fails":
            raise ValueError("as it does")
        done.append(job)

    latest = Latest(run, PAUSE)
    latest.ask("fails")
    until(lambda: latest.wait(1))
    latest.ask("next")
    assert latest.wait(PATIENCE)
    assert done == ["next"]

"""Who counts as a user, and what happens when users, keepers or folders vanish."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.local import in_use
from embedding_pipeline_tests.local import fake_service
from embedding_pipeline_tests.local.processes import User, eventually, is_alive, users

FAKE_USER = """
import sys
from pathlib import Path
from embedding_pipeline_tests.local import fake_service
home = Path(sys.argv[1])
print(fake_service.ensure(home), flush=True)
sys.stdin.read()
"""
# Uses the service for a moment and says whether it was there all the time.
BRIEF_USER = """
import sys, time
from pathlib import Path
from embedding_pipeline_tests.local import fake_service
home = Path(sys.argv[1])
fake_service.ensure(home)
end = time.monotonic() + float(sys.argv[2])
there = True
while there and time.monotonic() < end:
    there = fake_service.echoes(fake_service.directory_of(home))
    time.sleep(0.005)
print("there" if there else "gone", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def fake(home: Path) -> Iterator[Path]:
    """The directory of a fake service that this process has not used yet."""
    directory = fake_service.directory_of(home)
    yield directory
    in_use.release(directory)
    eventually(lambda: not in_use.is_kept(directory), "the keeper ends")


def keeper_pid(directory: Path) -> int:
    return int((directory / "pid").read_text())


def test_the_service_ends_soon_after_its_last_user_and_starts_again_for_the_next(
    home: Path, fake: Path
) -> None:
    fake_service.ensure(home)
    first = keeper_pid(fake)
    in_use.release(fake)
    eventually(lambda: not is_alive(first), "the keeper ends")
    fake_service.ensure(home)
    assert keeper_pid(fake) != first
    assert fake_service.echoes(fake)


def test_two_processes_share_one_keeper_and_it_outlives_the_first_of_them(
    home: Path, fake: Path
) -> None:
    with users(FAKE_USER, [home], [home]) as (one, two):
        assert one.answer() == two.answer()
        keeper = keeper_pid(fake)
        one.end()
        time.sleep(0.5)  # ten times the linger: nothing happens, which cannot be awaited
        assert is_alive(keeper)
        assert fake_service.echoes(fake)
        two.end()
        eventually(lambda: not is_alive(keeper), "the keeper ends")


def test_a_user_killed_with_kill_9_does_not_keep_the_service_alive(home: Path, fake: Path) -> None:
    with users(FAKE_USER, [home]) as (user,):
        user.answer()
        user.kill()
        eventually(lambda: not is_alive(keeper_pid(fake)), "the keeper ends")


def test_a_killed_keeper_is_replaced_on_the_next_call(home: Path, fake: Path) -> None:
    fake_service.ensure(home)
    first = keeper_pid(fake)
    os.kill(first, signal.SIGKILL)
    fake_service.ensure(home)
    assert keeper_pid(fake) != first
    assert fake_service.echoes(fake)


def test_a_forked_child_does_not_end_its_parents_use(home: Path, fake: Path) -> None:
    fake_service.ensure(home)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.5)  # ten times the linger
    assert fake_service.echoes(fake)


def test_a_keeper_whose_folder_was_removed_ends_and_a_new_one_can_start(
    home: Path, fake: Path
) -> None:
    fake_service.ensure(home)
    first = keeper_pid(fake)
    shutil.rmtree(fake)
    fake_service.ensure(home)
    assert keeper_pid(fake) != first
    eventually(lambda: not is_alive(first), "the first keeper ends")
    assert fake_service.echoes(fake)


def test_a_service_that_cannot_start_is_an_error_with_the_end_of_its_log(
    home: Path, fake: Path
) -> None:
    with pytest.raises(PipelineError, match="broken on purpose") as caught:
        fake_service.ensure(home, broken=True)
    assert str(fake / "log") in str(caught.value)
    assert fake_service.ensure(home)  # and it is no lasting harm


def test_a_folder_that_cannot_be_written_to_is_a_clear_error(home: Path) -> None:
    (home / "file").write_text("")
    with pytest.raises(PipelineError, match=r"cannot write to .*EMBEDDING_PIPELINE_HOME"):
        in_use.hold(home / "file" / "service")


def test_the_keeper_sees_nothing_secret_of_the_process_that_started_it(
    home: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    fake_service.ensure(home)
    environment = Path(f"/proc/{keeper_pid(fake)}/environ")
    if not environment.exists():
        pytest.skip("needs /proc")
    assert b"sk-secret" not in environment.read_bytes()


def test_no_race_leaves_a_user_without_service_or_two_services_on_one_folder(
    home: Path, fake: Path
) -> None:
    """Users come and go around a linger of 50 ms, so that starting and stopping collide.

    Keepers are killed in between; then only users that arrive later count.
    """
    dice = random.Random(7)
    running: list[tuple[User, float]] = []
    last_kill = 0.0
    answers: list[tuple[str, bool]] = []
    end = time.monotonic() + 6

    def collect(user: User, began: float) -> None:
        answers.append((user.answer(), last_kill < began))
        user.kill()

    while time.monotonic() < end:
        if len(running) < 4:
            began = time.monotonic()
            running.append((User(BRIEF_USER, home, dice.choice([0, 0.03, 0.1])), began))
        if dice.random() < 0.05 and (fake / "pid").exists():
            last_kill = time.monotonic()
            pid = keeper_pid(fake)
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        if len(running) >= dice.randint(1, 4):
            collect(*running.pop(dice.randrange(len(running))))
        if dice.random() < 0.3:
            time.sleep(dice.choice([0.02, 0.06, 0.12]))
    for user, began in running:
        collect(user, began)

    undisturbed = [answer for answer, counts in answers if counts]
    assert len(undisturbed) > 10
    assert set(undisturbed) == {"there"}
    assert not (fake / "violation").exists()

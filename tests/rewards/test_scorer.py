"""Scoring in a child process: values, failures of every kind, deadlines, and that nothing is left behind."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from raygrpo.config import RewardConfig
from raygrpo.rewards import Scorer, check_rewards
from raygrpo.rewards.child import MAX_RATIONALE
from raygrpo.rewards.inline import InlineRewards
from raygrpo.types import Prompt, Rollout, RolloutGroup

FUNCTIONS = """
import asyncio, ctypes, os, re, signal, subprocess, sys, time
from pathlib import Path

calls = []

def length(completion): return len(completion)
def half(completion): return 0.5
def all_arguments(completion, answer, prompt, row, finish_reason):
    given = [completion, answer, prompt, row, finish_reason]
    return float(given == ["é\\ud800", {"a": [1]}, "P", {"x": None}, "length"])
def spoil(row):
    row["seen"] = row.get("seen", 0) + 1
    return row["seen"]
def count_calls(completion):
    calls.append(completion)
    return len(calls)
def process_id(): return os.getpid()
def numpy_value(completion):
    import numpy as np
    return np.float32(completion)
def graded(completion, answer):
    return (0.5, "half of " + answer) if completion == "half" else (0.0, "long" * 1000)
async def judged(completion): return 1, "\\ud800"
def chatty(completion):
    print("protocol noise", completion, flush=True)
    return 1.0

def misbehave(completion):
    if completion == "raise": raise KeyError("no such key")
    if completion == "nan": return float("nan")
    if completion == "inf": return -float("inf")
    if completion == "none": return None
    if completion == "text": return "1.0"
    if completion == "list": return [1.0]
    if completion == "huge": return 10**400
    if completion == "coroutine": return asyncio.sleep(0)
    if completion == "sys.exit": sys.exit(0)
    if completion == "exit": os._exit(3)
    if completion == "segfault": ctypes.string_at(0)
    if completion == "abort": os.abort()
    if completion == "sleep": time.sleep(1000)
    if completion == "spin":
        while True: pass
    if completion == "spin in C": re.match("(a+)+$", "a" * 64 + "b")
    if completion == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    if completion == "close": os.closerange(3, 100)
    if completion == "recursion": return misbehave_again(completion)
    return True
def misbehave_again(completion): return misbehave_again(completion)

async def judge(completion):
    if completion == "raise": raise KeyError("no such key")
    if completion == "await": await asyncio.sleep(1000)
    if completion == "stubborn":
        while True:
            try: await asyncio.sleep(1000)
            except asyncio.CancelledError: pass
    if completion == "block": time.sleep(1000)
    if completion == "exit": os._exit(3)
    if completion == "sys.exit": sys.exit(0)
    await asyncio.sleep(0.05)
    return 1.0

waiting = []
async def meet(completion):
    waiting.append(completion)
    while len(waiting) < 8:
        await asyncio.sleep(0.01)
    return 1.0

def family(row):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(row["pids"]).write_text(f"{os.getpid()} {child.pid}")
    re.match("(a+)+$", "a" * 64 + "b")
def family_if_asked(completion, row): return family(row) if completion == "family" else 1.0
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("task")
    (directory / "scorer_task.py").write_text(FUNCTIONS)
    return directory


BUILT_IN = ("exact_match", "numeric_match", "format")


@pytest.fixture
def scorer(directory):
    """scorer(function or (function, settings), ...) -> Scorer; closed at the end, when no child may be left."""
    opened = []
    before = children()

    def make(*functions):
        functions = [function if isinstance(function, tuple) else (function, {}) for function in functions]
        specs = [{"use": name if name in BUILT_IN else f"scorer_task:{name}"} | more for name, more in functions]
        opened.append(Scorer(RewardConfig.model_validate({"functions": specs}), [str(directory)]))
        return opened[-1]

    yield make
    for one in opened:
        one.close()
    assert children() == before, "a child process is left, or a zombie"


def children():
    """Process ids of this process's children, zombies included."""
    tasks = Path("/proc/self/task").glob("*/children")
    return sorted(int(pid) for task in tasks for pid in task.read_text().split())


def runs(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, within_s=5.0):
    """Whether all these processes end in time."""
    deadline = time.monotonic() + within_s
    while any(runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(runs(pid) for pid in pids)


def group(*texts, prompt=None, error=""):
    rollouts = [
        Rollout(completion_ids=[1], behaviour_logprobs=[0.0], finish_reason="length", text=text, end_s=0.0)
        for text in texts
    ]
    prompt = prompt or Prompt(prompt_id=0, prompt_ids=[1], text="P", answer="4", row={})
    return RolloutGroup(
        ticket=0,
        prompt=prompt,
        policy_version=0,
        rollouts=rollouts,
        generator="g",
        generate_start_s=0.0,
        generate_end_s=0.0,
        error=error,
    )


def totals(scored):
    return [reward.total for reward in scored.rewards]


def errors(scored):
    return [reward.error for reward in scored.rewards]


# Values


def test_rewards_are_weighted_sums_in_the_order_of_the_configuration(scorer):
    scored = scorer(("length", {"weight": 2.0}), ("half", {"weight": -1.0}), "numeric_match").score(
        group("4", "", "abc")
    )
    assert [reward.components for reward in scored.rewards] == [[1.0, 0.5, 1.0], [0.0, 0.5, 0.0], [3.0, 0.5, 0.0]]
    assert totals(scored) == [2 * 1 - 0.5 + 1, 0 - 0.5 + 0, 2 * 3 - 0.5 + 0]
    assert errors(scored) == ["", "", ""]
    assert scored.score_start_s <= scored.score_end_s <= time.time()


def test_a_reward_says_what_it_was_given_for_if_the_function_does(scorer):
    scored = scorer("numeric_match", "half", "graded", "judged").score(group("half", "4"))
    first, second = scored.rewards
    assert first.components == [0.0, 0.5, 0.5, 1.0]
    assert first.rationales == ["no number where it should be ('last'); expected 4", "", "half of 4", "\ud800"]
    assert second.rationales[0] == "extracted 4, which is right"
    assert len(second.rationales[2]) == MAX_RATIONALE


def test_a_reward_that_failed_keeps_what_was_said_before(scorer):
    (reward,) = scorer("exact_match", "misbehave", "graded").score(group("raise")).rewards
    assert reward.error and reward.rationales == ["got 'raise', expected '4'", "", ""]


def test_in_one_process_rewards_say_the_same(scorer, directory, monkeypatch):
    monkeypatch.syspath_prepend(str(directory))
    specs = [{"use": "exact_match"}, {"use": "scorer_task:judged"}]
    config = RewardConfig.model_validate({"functions": specs})
    (reward,) = Scorer(config, process=InlineRewards(config.functions)).score(group("4")).rewards
    assert (reward.total, reward.rationales) == (2.0, ["'4' is right", "\ud800"])


def test_functions_get_what_the_group_holds(scorer):
    """Lone surrogates too, which a sampler can produce and UTF-8 cannot hold."""
    prompt = Prompt(prompt_id=0, prompt_ids=[1], text="P", answer={"a": [1]}, row={"x": None})
    assert totals(scorer("all_arguments").score(group("é\ud800", "other", prompt=prompt))) == [1.0, 0.0]


def test_a_function_cannot_spoil_its_arguments_for_the_next_call(scorer):
    prompt = Prompt(prompt_id=0, prompt_ids=[1], text="P", row={"x": 1})
    assert totals(scorer("spoil").score(group("a", "b", "c", prompt=prompt))) == [1.0, 1.0, 1.0]
    assert prompt.row == {"x": 1}


def test_numbers_of_other_libraries_count_and_prints_do_no_harm(scorer):
    assert totals(scorer("numpy_value", "chatty").score(group("0.5", "2"))) == [1.5, 3.0]


def test_the_process_lives_on_from_group_to_group(scorer):
    one = scorer("count_calls", "process_id")
    first, second = one.score(group("a", "b")), one.score(group("c"))
    assert [reward.components[0] for reward in (*first.rewards, *second.rewards)] == [1, 2, 3]
    pids = {reward.components[1] for reward in (*first.rewards, *second.rewards)}
    assert len(pids) == 1 and pids != {os.getpid()}


def test_a_failed_group_passes_through(scorer):
    scored = scorer("half").score(group(error="no generator"))
    assert scored.rewards == [] and scored.group.error == "no generator"


def test_megabytes_pass_in_both_directions(scorer):
    one = scorer("length", "misbehave")
    scored = one.score(group(*["x" * 3_000_000] * 4))
    assert [reward.components for reward in scored.rewards] == [[3_000_000.0, 1.0]] * 4


def test_async_functions_run_at_once(scorer):
    """Each call waits for the eighth to begin."""
    assert totals(scorer("meet").score(group(*"abcdefgh"))) == [1.0] * 8


# Failures

FAILURES = {
    "raise": "raised KeyError: 'no such key' (",
    "nan": "returned nan, which is not finite",
    "inf": "returned -inf, which is not finite",
    "none": "returned None (NoneType), which is no number",
    "text": "returned '1.0' (str), which is no number",
    "list": "returned [1.0] (list), which is no number",
    "huge": "which is no number",
    "coroutine": "returned a coroutine (declare the function itself `async`), which is no number",
    "recursion": "raised RecursionError",
    "sys.exit": "raised SystemExit: 0",
    "exit": "ended its process (exit code 3)",
    "segfault": "ended its process (signal 11 (Segmentation fault))",
    "abort": "ended its process (signal 6 (Aborted))",
    "close": "ended its process",
    "sleep": "took longer than 1 s",
    "spin": "took longer than 1 s",
    "spin in C": "took longer than 1 s",
    "stop": "took longer than 1 s",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_hits_its_own_rollout_only(scorer, failure):
    """The group's other rollouts and the group after it are sound."""
    hangs = "took longer" in FAILURES[failure]
    one = scorer("half", ("misbehave", {"timeout_s": 1.0 if hangs else 30.0, "name": "mine"}), "length")
    texts = ["fine", failure, "good"] if hangs else [failure, "fine", failure]
    scored = one.score(group(*texts))
    for text, reward in zip(texts, scored.rewards, strict=True):
        if text == failure:
            assert reward.total == 0.0 and reward.components[0] == 0.5 and all(map(math.isnan, reward.components[1:]))
            assert reward.error.startswith("reward function 'mine' ") and FAILURES[failure] in reward.error
        else:
            assert (reward.total, reward.error) == (0.5 + 1.0 + 4.0, "")
    assert totals(one.score(group("fine"))) == [5.5]


ASYNC_FAILURES = {
    "raise": "raised KeyError: 'no such key' (",
    "sys.exit": "raised SystemExit: 0",
    "await": "took longer than 1 s",
    "stubborn": "took longer than 1 s",
    "block": "took longer than 1 s",
    "exit": "ended its process (exit code 3)",
}


@pytest.mark.parametrize("failure", ASYNC_FAILURES)
def test_a_failure_of_an_async_function_hits_its_own_rollout_only(scorer, failure):
    scored = scorer(("judge", {"timeout_s": 1.0})).score(group("a", failure, "b", "c"))
    assert totals(scored) == [1.0, 0.0, 1.0, 1.0]
    assert scored.rewards[1].error.startswith(f"reward function 'judge' {ASYNC_FAILURES[failure]}")
    assert [error for i, error in enumerate(errors(scored)) if i != 1] == ["", "", ""]


def test_a_deadline_is_for_one_call_not_for_the_group(scorer, directory):
    (directory / "slow_task.py").write_text("import time\ndef slow(completion):\n    time.sleep(0.3)\n    return 1.0\n")
    config = RewardConfig.model_validate({"functions": [{"use": "slow_task:slow", "timeout_s": 1.0}]})
    slow = Scorer(config, [str(directory)])
    assert totals(slow.score(group(*"abcde"))) == [1.0] * 5
    slow.close()


def test_an_infinite_sum_is_a_failure(scorer):
    scored = scorer(("length", {"weight": 1e308}), ("length", {"weight": 1e308, "name": "again"})).score(
        group("a", "aa")
    )
    assert totals(scored) == [0.0, 0.0] and "weighted sum of rewards [2.0, 2.0] is inf" in scored.rewards[1].error


def test_a_process_that_dies_between_groups_is_replaced(scorer):
    one = scorer("process_id")
    pid = int(totals(one.score(group("a")))[0])
    os.kill(pid, signal.SIGKILL)
    assert gone([pid])
    assert totals(one.score(group("a", "b")))[0] != pid


def test_functions_that_cannot_be_loaded_are_an_error_at_once(scorer, directory):
    with pytest.raises(ValueError, match=r"reward.functions: 'scorer_task:lenght': .* did you mean 'length'\?"):
        scorer("lenght")
    (directory / "deadly_task.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(ValueError, match=r"loading the reward functions ended its process \(exit code 5\)"):
        Scorer(RewardConfig.model_validate({"functions": [{"use": "deadly_task:f"}]}), [str(directory)])


@pytest.mark.parametrize("kind", ["", "async "])
def test_a_process_that_something_else_killed_costs_no_rollout(directory, kind):
    (directory / "killed_task.py").write_text(
        textwrap.dedent(f"""
        import os, pathlib
        {kind}def f(completion, row):
            mark = pathlib.Path(row["marks"], completion)
            if not mark.exists():  # the first call for this completion
                mark.touch()
                os.kill(os.getpid(), 9)
            return len(completion)
        """)
    )
    marks = directory / f"marks{len(kind)}"
    marks.mkdir()
    scorer = Scorer(RewardConfig.model_validate({"functions": [{"use": "killed_task:f"}]}), [str(directory)])
    prompt = Prompt(prompt_id=0, prompt_ids=[1], text="P", row={"marks": str(marks)})
    scored = scorer.score(group("a", "bb", "ccc", prompt=prompt))
    assert [(reward.total, reward.error) for reward in scored.rewards] == [(1.0, ""), (2.0, ""), (3.0, "")]
    scorer.close()


def test_functions_that_vanish_before_a_restart_fail_the_rollouts(directory):
    module = directory / "vanishing_task.py"
    module.write_text("import os\ndef f(completion): os._exit(1) if completion == 'exit' else None\n")
    scorer = Scorer(RewardConfig.model_validate({"functions": [{"use": "vanishing_task:f"}]}), [str(directory)])
    module.unlink()
    scored = scorer.score(group("exit", "a"))
    assert "exit code 1" in scored.rewards[0].error and "there is no module 'vanishing_task'" in scored.rewards[1].error
    scorer.close()


def test_an_interrupted_call_leaves_no_answers_for_the_next(scorer):
    def interrupt(*_):
        raise KeyboardInterrupt

    # Not SIGINT: a process started in the background of a script inherits that as ignored.
    previous = signal.signal(signal.SIGALRM, interrupt)
    one = scorer("length", "misbehave")
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            one.score(group("sleep", "aaaa"))
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert [reward.components for reward in one.score(group("a")).rewards] == [[1.0, 1.0]]


# Nothing is left behind

PARENT = """
    import os, sys, time
    from raygrpo.config import RewardConfig
    from raygrpo.rewards import Scorer
    from tests.rewards.test_scorer import group, Prompt
    config = RewardConfig.model_validate({"functions": [{"use": "scorer_task:family"}]})
    prompt = Prompt(prompt_id=0, prompt_ids=[1], text="P", row={"pids": sys.argv[2]})
    Scorer(config, [sys.argv[1]]).score(group("a", prompt=prompt))
"""


def test_when_the_parent_is_killed_the_child_ends_though_it_spins_in_c(directory, tmp_path):
    """And so do the processes that the reward function started."""
    pids_file = tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT), str(directory), str(pids_file)])
    pids = wait_for_pids(pids_file)
    assert all(map(runs, pids)) and len(pids) == 2
    parent.kill()
    parent.wait()
    assert gone(pids)


def test_at_a_deadline_the_processes_of_a_function_end_with_it(scorer, tmp_path):
    prompt = Prompt(prompt_id=0, prompt_ids=[1], text="P", row={"pids": str(tmp_path / "pids")})
    scored = scorer(("family", {"timeout_s": 0.5})).score(group("a", prompt=prompt))
    assert "took longer" in scored.rewards[0].error
    assert gone(wait_for_pids(tmp_path / "pids"))


def wait_for_pids(path):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().split()) == 2:
            return [int(pid) for pid in path.read_text().split()]
        time.sleep(0.02)
    raise AssertionError("the reward function never ran")


def test_close_ends_the_child_and_frees_descriptors(directory):
    config = RewardConfig.model_validate({"functions": [{"use": "scorer_task:process_id"}]})

    def cycle(*, close):
        scorer = Scorer(config, [str(directory)])
        pid = int(totals(scorer.score(group("a")))[0])
        if close:
            scorer.close()
            scorer.close()
        del scorer
        assert not runs(pid)

    cycle(close=True)
    before, descriptors = children(), os.listdir("/proc/self/fd")
    for close in (True, False, True, False):
        cycle(close=close)
    assert children() == before and len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_restarts_leak_no_descriptors(scorer):
    one = scorer(("misbehave", {"timeout_s": 0.2}))
    one.score(group("exit"))
    descriptors = len(os.listdir("/proc/self/fd"))
    one.score(group(*["exit"] * 3, "sleep", "segfault"))
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.slow
def test_in_a_ray_actor_the_child_ends_with_the_actor(directory, tmp_path):
    """Whose process Ray kills without a word, here while the function spins in C; scoring works there, too."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        functions = [{"use": "scorer_task:length"}, {"use": "scorer_task:family_if_asked"}]
        config = RewardConfig.model_validate({"functions": functions})
        scorer = ray.remote(Scorer).remote(config, [str(directory)])
        prompt = Prompt(prompt_id=0, prompt_ids=[1], text="P", row={"pids": str(tmp_path / "pids")})
        assert totals(ray.get(scorer.score.remote(group("ab", prompt=prompt)))) == [3.0]
        scorer.score.remote(group("family", prompt=prompt))
        pids = wait_for_pids(tmp_path / "pids")
        assert all(map(runs, pids))
        ray.kill(scorer)
        assert gone(pids, within_s=20)
    finally:
        ray.shutdown()


# check


def test_check_rewards_tells_right_answers_from_empty_ones(directory):
    functions = [
        {"use": "numeric_match"},
        {"use": "format", "args": {"pattern": ".*"}, "name": "blind"},
        {"use": "scorer_task:length"},
        {"use": "exact_match", "args": {"extract_answer": "####(.*)"}, "name": "broken"},
    ]
    prompts = [Prompt(prompt_id=i, prompt_ids=[1], text="P", answer=answer) for i, answer in enumerate([10, "20"])]
    checks = check_rewards(RewardConfig.model_validate({"functions": functions}), prompts, [str(directory)])
    assert [check.function for check in checks] == ["numeric_match", "blind", "length", "broken"]
    assert [(check.reference, check.empty) for check in checks] == [(1.0, 0.0), (1.0, 1.0), (2.0, 0.0), (None, None)]
    assert [bool(check.error) for check in checks] == [False, False, False, True]
    assert "reward function 'broken' raised ValueError: extract_answer finds nothing" in checks[3].error
    assert all(0 < check.ms < 1000 for check in checks)


def test_check_rewards_without_answers_tries_empty_completions(directory):
    prompts = [Prompt(prompt_id=0, prompt_ids=[1], text="P")]
    (check,) = check_rewards(
        RewardConfig.model_validate({"functions": [{"use": "scorer_task:length"}]}), prompts, [str(directory)]
    )
    assert (check.reference, check.empty, check.error) == (None, 0.0, "")


def test_names_of_rewards_are_checked():
    def names(*names):
        RewardConfig.model_validate({"functions": [{"use": "exact_match", "name": name} for name in names]})

    names("a", "b.c-d")
    for taken in (["mean"], ["a", "a"], ["a@b"]):
        with pytest.raises(ValueError, match="name"):
            names(*taken)
    with pytest.raises(ValueError, match="finite"):
        RewardConfig.model_validate({"functions": [{"use": "exact_match", "weight": math.inf}]})

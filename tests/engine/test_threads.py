"""Threads that call one model at once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from dera_peft.engine.turns import Turn

IDS = torch.arange(3, 63).view(6, 10)
NEW = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_each_thread_gets_its_own_text(tiny_model):
    def generate(job):
        row, lam, beams = job
        return tiny_model.generate(IDS[row : row + 1 + row % 2], lam=lam, num_beams=beams, **NEW).tolist()

    jobs = [(row, lam, beams) for row in range(4) for lam in (0.0, 0.5, 1.0) for beams in (1, 2)]
    expected = [generate(job) for job in jobs]
    assert len(set(map(str, expected))) > 12
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(generate, jobs)) == expected


@torch.no_grad()
def test_forward_beside_generate(tiny_model):
    def logits(lam):
        return tiny_model(IDS, lam=lam).logits

    lambdas = [0.0, 0.5, 1.0, -1.0] * 4
    expected = [logits(lam) for lam in lambdas]
    text = tiny_model.generate(IDS, lam=0.5, num_beams=2, **NEW).tolist()
    with ThreadPoolExecutor(4) as threads:
        texts = [threads.submit(tiny_model.generate, IDS, lam=0.5, num_beams=2, **NEW) for _ in range(3)]
        found = list(threads.map(logits, lambdas))
        assert all(future.result().tolist() == text for future in texts)
    assert all(map(torch.equal, found, expected))


def test_turns_are_taken_in_the_order_of_waiting():
    """A thread that takes its turn again and again lets those in who wait; it may take it twice at once."""
    turn, order, ready = Turn(), [], threading.Event()

    def wait(name):
        ready.set()
        with turn, turn:
            order.append(name)

    threads = []
    with turn:
        for name in ("first", "second"):
            ready.clear()
            threads.append(threading.Thread(target=wait, args=(name,)))
            threads[-1].start()
            ready.wait()
            while len(turn._waiting) < len(threads):
                time.sleep(0.001)
    with turn:
        order.append("again")
    for thread in threads:
        thread.join()
    assert order == ["first", "second", "again"]

"""Ordinary pytest functions on N gloo ranks.

    from harness import ranks

    @ranks(2)                       # or @ranks(1, 2, 4): one test per world size
    @pytest.mark.parametrize("numel", [1, 1000])
    def test_all_reduce(numel, tmp_path):
        x = torch.ones(numel)
        dist.all_reduce(x)
        assert x.sum() == numel * dist.get_world_size()

The body runs once on every rank, in its own process, inside a fresh gloo process group. Fixtures are
evaluated once, in the process of pytest, and sent to the ranks by pickle (so `tmp_path` is one folder that
all ranks share); `monkeypatch` is replaced by a fresh one on each rank. Each rank starts the body with one
intra-op thread, seed 0, the working folder, environment and warning filters of the test, and the variables
that torchrun would set.

What is reported: the traceback of the rank that failed first; the stacks of every rank after `timeout_s`;
the signal that killed a rank; threads and process groups that the body left behind; a skip when every rank
skips.

How it is fast: see the note in `pool.py`.
"""

from harness.decorator import ranks

__all__ = ["ranks"]

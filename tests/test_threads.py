"""Processors that a process may use: affinity and quota; the threads of calls under a quota."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xlmr_ext.threads import CallThreads, available_cpus, cpu_quota


def cgroups(root: Path, memberships: str, mounts: str, **quotas: str) -> Path:
    """A file tree as the kernel shows it; ``__`` in a name stands for ``/``."""
    contents = {"proc/self/cgroup": memberships, "proc/self/mountinfo": mounts}
    contents |= {name.replace("__", "/").replace("cpu_", "cpu."): q for name, q in quotas.items()}
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V2 = "30 23 0:26 / /cg rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1 = """\
32 31 0:29 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /m rw - cgroup x rw,memory
"""


@pytest.mark.parametrize(
    ("memberships", "mounts", "files", "quota"),
    [
        ("0::/a/b\n", V2, {"cg__a__b__cpu_max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", V2, {"cg__a__b__cpu_max": "max 100000\n"}, None),
        # A group above may allow less.
        (
            "0::/a/b\n",
            V2,
            {"cg__a__b__cpu_max": "400000 100000\n", "cg__a__cpu_max": "200000 100000\n"},
            2.0,
        ),
        # In a container the path is the host's, and the mount is the group.
        ("0::/host/pod\n", V2, {"cg__cpu_max": "50000 100000\n"}, 0.5),
        ("0::/../other\n", V2, {"cg__cpu_max": "300000 100000\n"}, 3.0),
        (
            "0::/pod\n",
            "30 23 0:26 /pod /cg rw - cgroup2 cgroup2 rw\n",
            {"cg__cpu_max": "300000 100000\n"},
            3.0,
        ),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
            V1,
            {
                "cg__cpu__x__cpu_cfs_quota_us": "250000\n",
                "cg__cpu__x__cpu_cfs_period_us": "100000\n",
                "m__x__cpu_cfs_quota_us": "1\n",
            },
            2.5,
        ),
        (
            "3:cpu,cpuacct:/\n",
            V1,
            {"cg__cpu__cpu_cfs_quota_us": "-1\n", "cg__cpu__cpu_cfs_period_us": "100000\n"},
            None,
        ),
        ("garbage\n", "garbage\n", {}, None),
    ],
)
def test_cpu_quota(
    tmp_path: Path,
    memberships: str,
    mounts: str,
    files: dict[str, str],
    quota: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = cgroups(tmp_path, memberships, mounts, **files)
    assert cpu_quota(root) == quota
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5, 6, 7})
    assert available_cpus(root) == {None: 8, 0.5: 1, 1.5: 2, 2.0: 2, 2.5: 3, 3.0: 3}[quota]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert available_cpus(root) == 1


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert available_cpus(tmp_path) >= 1


VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may run on 16 processors and whose user chose no number of threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def with_quota(root: Path, quota: str) -> Path:
    return cgroups(root, "0::/a\n", V2, cg__a__cpu_max=f"{quota}\n")


@pytest.mark.parametrize("torchs_own", [16, 8], ids=["processors", "cores"])
@pytest.mark.parametrize(
    ("quota", "limit"), [("200000 100000", 2), ("150000 100000", 2), ("20000 100000", 1)]
)
def test_calls_take_the_quota_where_nobody_chose(
    tmp_path: Path, host: None, torchs_own: int, quota: str, limit: int
) -> None:
    threads = CallThreads(torchs_own, with_quota(tmp_path, quota))
    assert threads(torchs_own) == limit
    assert threads.reason(torchs_own).startswith("a CPU quota of ")
    # torch.set_num_threads was called: to less, to more.
    for chosen in (1, 5, 20):
        assert threads(chosen) == chosen
        assert threads.reason(chosen) == "torch.get_num_threads()"


def test_no_quota_and_a_wide_one_change_nothing(tmp_path: Path, host: None) -> None:
    assert CallThreads(16, tmp_path)(16) == 16
    assert CallThreads(16, with_quota(tmp_path / "max", "max 100000"))(16) == 16
    assert CallThreads(16, with_quota(tmp_path / "wide", "1600000 100000"))(16) == 16
    # Half of the processors, one a core, and a quota for more than that.
    assert CallThreads(8, with_quota(tmp_path / "cores", "1200000 100000"))(8) == 8


def test_a_choice_made_before_stays(
    tmp_path: Path, host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_quota(tmp_path, "200000 100000")
    # torch.set_num_threads before the import: no number that torch takes by itself.
    assert CallThreads(7, root)(7) == 7
    for name in VARIABLES:
        monkeypatch.setenv(name, "16")
        assert CallThreads(16, root)(16) == 16
        monkeypatch.setenv(name, "")
        assert CallThreads(16, root)(16) == 2


def test_the_package_limits_its_calls_and_not_torch(tmp_path: Path) -> None:
    """With torch's own number, on a machine of which the quota leaves half a processor."""
    program = (
        "import torch, xlmr_ext.threads\n"
        "before = torch.get_num_threads()\n"
        "xlmr_ext.threads.cpu_quota = lambda root: 0.5\n"
        "info = xlmr_ext.build_info()\n"
        "print(before == torch.get_num_threads(), info['threads'], info['threads_by'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    by = "torch.get_num_threads()" if len(os.sched_getaffinity(0)) == 1 else "a CPU quota of 0.5"
    assert result.stdout == f"True 1 {by}\n"

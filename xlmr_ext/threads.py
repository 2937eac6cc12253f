"""How many processors this process may use, and how many threads a native call takes."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath


class CallThreads:
    """The number of threads of native calls: torch's, or the CPU quota's where nobody chose one.

    torch takes a thread for every processor, or every core, that the process may run on, and knows
    of no quota; threads beyond the quota are stopped in turn, while the others wait for them. So
    where torch's number is its own choice and above the quota, calls take the quota, rounded up as
    in `available_cpus`. torch's setting stays what it is. The number was somebody's choice where

    * ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` is set, or
    * ``torch.set_num_threads`` has changed it since this object was made, or
    * it is less than half of the processors that the process may run on.

    Args:
        torch_threads: ``torch.get_num_threads()`` now.
        root: where ``/proc`` and the cgroup file systems are looked for.

    Attributes:
        available: processors that this process may use, see `available_cpus`.
        limit: what replaces torch's own number; None where that is fine as it is.
        quota: the CPU quota in processors that ``limit`` comes from.
    """

    def __init__(self, torch_threads: int, root: Path = Path("/")) -> None:
        self.replaced = torch_threads
        self.limit: int | None = None
        self.quota = cpu_quota(root)
        self.available = _within(self.quota)
        chosen = any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
        if self.quota is None or chosen or 2 * torch_threads < _affinity():
            return
        if self.available < torch_threads:
            self.limit = self.available

    def __call__(self, torch_threads: int) -> int:
        """Threads of a call where torch would take ``torch_threads``."""
        if self.limit is None or torch_threads != self.replaced:
            return torch_threads
        return self.limit

    def reason(self, torch_threads: int) -> str:
        """What decides the answer to ``torch_threads``, for people."""
        if self(torch_threads) == torch_threads:
            return "torch.get_num_threads()"
        return f"a CPU quota of {self.quota:g}"


def available_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may use, at least 1.

    The smaller of its affinity mask (``taskset``, cpusets) and the CPU quota of its cgroup and
    of every cgroup above it, version 1 or 2, rounded up: of 1.5 processors one thread would leave
    a third unused. ``os.cpu_count()`` sees neither.

    Args:
        root: where ``/proc`` and the cgroup file systems are looked for.
    """
    return _within(cpu_quota(root))


def _within(quota: float | None) -> int:
    """Processors by a quota and the affinity mask, at least 1."""
    allowed = _affinity()
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU quota in processors by cgroup version 1 or 2, or None where there is no limit."""
    memberships = _read(root / "proc/self/cgroup").splitlines()
    mounts = _read(root / "proc/self/mountinfo").splitlines()
    quotas = []
    for membership in memberships:
        hierarchy, _, rest = membership.partition(":")
        controllers, _, path = rest.partition(":")
        version_2 = hierarchy == "0" and not controllers
        if not version_2 and "cpu" not in controllers.split(","):
            continue
        for mount_root, mount_point in _mounts(mounts, version_2):
            for group in _groups(path, mount_root, root / mount_point.lstrip("/")):
                quota = _quota_v2(group) if version_2 else _quota_v1(group)
                if quota is not None:
                    quotas.append(quota)
    return min(quotas, default=None)


def _mounts(mounts: list[str], version_2: bool) -> list[tuple[str, str]]:
    """(root, mount point) of each cgroup file system that can hold the CPU quota."""
    found = []
    for mount in mounts:
        # "id parent major:minor root mount-point options [tags] - type source super-options"
        fields, separator, tail = mount.partition(" - ")
        left, right = fields.split(), tail.split()
        if not separator or len(left) < 5 or len(right) < 3:
            continue
        if version_2:
            matches = right[0] == "cgroup2"
        else:
            matches = right[0] == "cgroup" and "cpu" in right[2].split(",")
        if matches:
            found.append((left[3], left[4].replace("\\040", " ")))
    return found


def _groups(path: str, mount_root: str, mount_point: Path) -> list[Path]:
    """Directories of the cgroup and of those above it, as far as they are mounted."""
    try:
        relative = PurePosixPath(path).relative_to(mount_root)
    except ValueError:
        # In a container the path can be the host's, while its own group is the mount itself.
        relative = PurePosixPath()
    if ".." in relative.parts:
        relative = PurePosixPath()
    return [mount_point / relative, *(mount_point / parent for parent in relative.parents)]


def _quota_v2(group: Path) -> float | None:
    fields = _read(group / "cpu.max").split()
    if len(fields) != 2 or fields[0] == "max":
        return None
    return _ratio(fields[0], fields[1])


def _quota_v1(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    try:
        microseconds, of = int(quota), int(period)
    except ValueError:
        return None
    return microseconds / of if microseconds > 0 and of > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""

"""How many processors this process may use: its affinity and its container's quota."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath


def available_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may use, at least 1.

    The smaller of its affinity mask (``taskset``, cpusets) and the CPU quota of its cgroup and
    of every cgroup above it, version 1 or 2, rounded up. ``os.cpu_count()`` sees neither.

    Args:
        root: where ``/proc`` and the cgroup file systems are looked for.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        allowed = os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


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

# Sourced by .ci/run and .ci/full: where things are, and a header with the seconds for every step.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONPATH VIRTUAL_ENV
if [ -d ../shared/data ]; then
  XLMR_EXT_DATA=$(cd ../shared/data && pwd)
  export XLMR_EXT_DATA
fi

step() {
  if [ -n "${step_name:-}" ]; then
    printf '=== %s: %d s\n' "$step_name" $((SECONDS - step_began))
  fi
  step_name=$1
  step_began=$SECONDS
  if [ -n "$step_name" ]; then printf '\n=== %s\n' "$step_name"; fi
}

fail() {
  printf 'FAILED: %s\n' "$*" >&2
  exit 1
}

# The first fenced block of the README behind a marker such as <!-- test-command -->.
readme_command() {
  awk -v marker="<!-- $1 -->" '
    index($0, marker) { found = 1; next }
    found && /^```/ { if (inside) exit; inside = 1; next }
    inside { print }
  ' README.md
}

# What an extra of the installed package asks for, one requirement a line.
requirements_of() {
  "$root/.venv/bin/python" - "$1" <<'PYTHON'
import importlib.metadata, sys
for requirement in importlib.metadata.requires("xlmr_ext") or []:
    name, _, marker = requirement.partition(";")
    if f'extra == "{sys.argv[1]}"' in marker.replace("'", '"'):
        print(name.strip())
PYTHON
}

build_native() {  # build_native DIRECTORY [CMAKE OPTION...]
  .venv/bin/cmake -S . -B "$1" -G Ninja -DCMAKE_MAKE_PROGRAM="$root/.venv/bin/ninja" \
    -DXLMR_EXT_BUILD_NATIVE_TESTS=ON -DXLMR_EXT_PYTHON=OFF "${@:2}" >"$scratch/cmake.log" ||
    { cat "$scratch/cmake.log"; return 1; }
  .venv/bin/cmake --build "$1"
}

# The names of the tables that a report of the native tests says were run.
tables_run() { awk '/ cases / { print $1 }' "$1" | sort -u | paste -sd ' '; }

# The compiler for aarch64 and the emulator that runs what it builds.
install_cross_tools() {
  if command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; then return; fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    fail "no aarch64-linux-gnu-g++ or no qemu-aarch64" \
      "(on Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    g++-aarch64-linux-gnu qemu-user >"$scratch/apt.log" || { cat "$scratch/apt.log"; return 1; }
}

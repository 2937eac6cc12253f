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

configure() {  # configure DIRECTORY [CMAKE OPTION...]
  .venv/bin/cmake -S . -B "$1" -G Ninja -DCMAKE_MAKE_PROGRAM="$root/.venv/bin/ninja" "${@:2}" \
    >"$scratch/cmake.log" || { cat "$scratch/cmake.log"; return 1; }
}

build_native() {  # build_native DIRECTORY [CMAKE OPTION...]
  configure "$1" -DXLMR_EXT_BUILD_NATIVE_TESTS=ON -DXLMR_EXT_PYTHON=OFF "${@:2}"
  .venv/bin/cmake --build "$1"
}

# The Python modules of a build come with the package that .venv has: package_with FOLDER MODULE...
package_with() {
  mkdir -p "$1"
  cp -r "$(cd "$scratch" && "$root/.venv/bin/python" -c \
    'import pathlib, xlmr_ext; print(pathlib.Path(xlmr_ext.__file__).parent)')" "$1/xlmr_ext"
  cp "${@:2}" "$1/xlmr_ext/"
}

# What a build of the Python modules needs to know.
python_options() {
  printf -- '-DXLMR_EXT_PYTHON=ON\n-DPython_EXECUTABLE=%s\n-DCMAKE_PREFIX_PATH=%s\n' \
    "$root/.venv/bin/python" "$("$root/.venv/bin/python" -m pybind11 --cmakedir)"
}

# _cuda for these architectures, the registers of its kernels, and its tests that need no GPU.
build_cuda() {  # build_cuda DIRECTORY ARCHITECTURES
  if ! command -v nvcc >/dev/null; then
    printf 'not run: there is no nvcc here\n'
    return
  fi
  mapfile -t options < <(python_options)
  configure "$1" -DXLMR_EXT_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$2" \
    -DCMAKE_CUDA_FLAGS=-Xptxas=-v "${options[@]}"
  .venv/bin/cmake --build "$1" --target _cuda >"$scratch/nvcc.log" ||
    { cat "$scratch/nvcc.log"; return 1; }
  .venv/bin/python tests/simt/kernel_resources.py "$scratch/nvcc.log"
  package_with "$scratch/cuda" "$1"/_cuda*.so
  PYTHONPATH="$scratch/cuda" .venv/bin/xlmr-ext info
  PYTHONPATH="$scratch/cuda" .venv/bin/pytest -q tests/test_cuda_kernels.py \
    tests/test_package.py -k 'cuda_kernels or stub'
  rm -r "$scratch/cuda"
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

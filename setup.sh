#!/usr/bin/env bash
# Makes .venv and installs Tidepool into it. `make` calls it before anything else; when nothing changed it ends at once.
#
# TIDEPOOL_DEVICE=cpu|gpu chooses the engine; without it, a working nvidia-smi means gpu.
# Where pip is configured with a folder of wheels or with other indexes, the same are used; elsewhere PyTorch's own index.
set -euo pipefail
cd "$(dirname "$0")"

UV_VERSION=0.13.9
say() { echo "[setup] $*"; }
fail() { echo "[setup] error: $*" >&2; exit 2; }

device=${TIDEPOOL_DEVICE:-}
if [ -z "$device" ]; then
  if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then device=gpu; else device=cpu; fi
fi
case $device in cpu|gpu) ;; *) fail "TIDEPOOL_DEVICE must be cpu or gpu, found $device" ;; esac

stamp=.venv/.tidepool-$(cat pyproject.toml setup.sh <(echo "$device $PWD") | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

python=
for candidate in python3.11 python3; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "$python" ] || fail "Python 3.11 is missing: apt-get install python3.11 python3.11-venv"
"$python" -c 'import ensurepip' 2>/dev/null || fail "the venv module is missing: apt-get install python3.11-venv"
if [ "$device" = cpu ]; then
  "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || fail "libnuma is missing: apt-get install libnuma1"
fi

say "making .venv with $("$python" --version) for $device; the first time takes some minutes"
[ -x .venv/bin/python ] || "$python" -m venv .venv
say "installing uv $UV_VERSION"
.venv/bin/python -m pip install --quiet "uv==$UV_VERSION"

# What pip was told, told to uv: pip's environment variables first, as in pip itself.
setting() {
  local variable=PIP_$(echo "$1" | tr 'a-z-' 'A-Z_')
  if [ -n "${!variable:-}" ]; then echo "${!variable}"; else .venv/bin/python -m pip config get "global.$1" 2>/dev/null || true; fi
}
find_links=$(setting find-links)
index=$(setting index-url)
more=$(setting extra-index-url)
cert=$(setting cert)
if [ -n "$cert" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE=$cert; fi
options=()
for folder in $find_links; do options+=(--find-links "$folder"); done
if [ -n "$index" ]; then options+=(--default-index "$index"); fi
for url in $more; do options+=(--index "$url"); done
# pip takes the best version of all indexes; uv would take the first index that has the package.
if [ -n "$more" ]; then options+=(--index-strategy unsafe-best-match); fi
if [ "$device" = gpu ]; then
  # Without the overrides of pyproject.toml: CUDA torch has its torchvision.
  options+=(--no-config)
  if [ -z "$find_links" ]; then options+=(--torch-backend auto); fi
elif [ -z "$find_links" ]; then
  options+=(--torch-backend cpu)
fi

say "installing Tidepool, Ray and vLLM"
.venv/bin/uv pip install --python .venv/bin/python "${options[@]}" -e ".[$device,train,postgres,dev]"
# Where Python may not write bytecode (PYTHONDONTWRITEBYTECODE), every process would compile torch and vLLM again: `up` takes twice as long.
say "compiling bytecode"
.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true  # some packages ship files that are not for this Python
rm -f .venv/.tidepool-*
touch "$stamp"
say "done"

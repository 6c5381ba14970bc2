"""The hostile files of torch are beside their own tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "pretrained"))

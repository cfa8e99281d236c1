"""What holds for every test: one thread, no network, no traces in the user's directories."""

import os

# Read when torch and huggingface_hub are imported, by this process and by those that tests start. One thread: two
# cores that run several test processes have none to spare. No bars: as the command line sets it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

# Where there is no card, the accelerator's kernels are tested in Triton's interpreter. Whether its language is for
# that, Triton decides when it is first imported: here. The variable itself is for those tests alone.
if find_spec("triton") and not any(Path(card).exists() for card in ("/dev/nvidiactl", "/dev/dxg")):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401

hypothesis.settings.register_profile("moespac", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("moespac")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Profiles that engines keep between runs go to a directory of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent

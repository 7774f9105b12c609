"""Steps 1 and 2: text to token chunks, and chunks to one dataset."""

import os

# numpy's library would start a thread per core in each of as many workers as there are cores, more than a container may
# have on a large machine, for matrix products that nothing here has. Read when numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

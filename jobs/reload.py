"""What `validate` runs in a process of its own: load a model from its files, and answer the first test rows."""

import pickle
import sys

import numpy as np

from .evaluate import Sources, test_rows
from .validate import ROWS

if __name__ == "__main__":
    sources: Sources = pickle.loads(sys.stdin.buffer.read())  # noqa: S301  from `validate`, our own process
    np.save(sys.argv[1], sources.engine().predict(test_rows(sources, ROWS)[0]))

"""`python -m perf.worker`: a worker process."""

from perf.worker.server import main

main()

"""The logger of this package."""

import logging

# A child of Ray Serve's logger: in a replica only that one is set up to write INFO lines, to the
# replica's own log file and to its output (ray.serve._private.logging_utils, Ray 2.60).
LOGGER_NAME = "ray.serve.rayserve_hooks"
logger = logging.getLogger(LOGGER_NAME)

"""Order, calls, trace and limits of callbacks: pluggy, pydantic and the standard library."""

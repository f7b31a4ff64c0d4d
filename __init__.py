"""heliograph: from raw data to a private prediction, on Ray."""
__version__ = "0.1.0"

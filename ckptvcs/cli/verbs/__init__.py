"""One short function per verb. A verb's result, if any, is its exit code."""

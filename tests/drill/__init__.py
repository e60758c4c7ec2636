"""A drill of faults: killed runs, damaged files and bad options. README.md says what each must come to."""

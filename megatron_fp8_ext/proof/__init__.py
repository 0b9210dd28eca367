"""The same training in several precisions, and the page that says whether it came out the same.

plan        which runs: recipe x seed, each a complete command; pure
run         runs them, resumably, on the GPUs there are
record      what a run left behind, and whether two runs may be compared
verdict     paired gap, its interval, and the rule
result      all figures of a report, each once
tables, figures, page     the report's parts; report writes it
"""

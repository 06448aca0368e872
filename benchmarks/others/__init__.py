"""Networks of others that the rules did not grow up with, each beside a count of its units by hand, as a table.

`python -m benchmarks.others` runs from the root of a checkout. The data goes names -> tasks -> rows -> table, one file
each: `zoo` and `counts`, (`trying`) in processes of coverage's pool, `rows`, `render`.
"""

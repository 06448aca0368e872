"""What SEs do on real images that come with Python: three studies on scikit-learn's handwritten digits.

`python -m benchmarks.digits` runs from the root of a checkout, on one core, without a download. The data goes
images -> networks -> rows -> tables and plots, one file each: `data`, `network` and `training` with `setting`,
`studies`, `rows`, `evidence`, `render` with `prose` and a text for each study, `figures`.
"""

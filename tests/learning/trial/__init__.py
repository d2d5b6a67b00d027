"""One run: `settings`, its data (`recall`, `text`), its model (`models`, `controls`), `training`, and its figures.

What a report keeps depends on these files and on the packages, and on nothing else.
"""

"""What a run leaves behind: its folder, tables, plots, one self-contained report, and the lines it prints on the way.

`run_folder` keeps the files, `tables` and `plots` make what goes into them, `report` puts all on one page, `progress`
talks to the terminal meanwhile.
"""

"""Know before the run: every file of the data opened and checked, with a report. The door is `run.verify`."""

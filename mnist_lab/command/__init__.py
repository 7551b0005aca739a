"""What the scripts share on the command line. Importing it comes first, so that even imports end in one line."""

from mnist_lab.command.ending import handle_endings

handle_endings()

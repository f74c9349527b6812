-- loses: which files were imported, and how far
drop table imports;

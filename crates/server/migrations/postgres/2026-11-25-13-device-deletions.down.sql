-- loses: which devices are being deleted: those stay, without a part of their events
drop table device_deletions;

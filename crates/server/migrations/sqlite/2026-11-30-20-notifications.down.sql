-- loses: channels, routes and messages, also those that wait to be sent
drop table notification_items;
drop table notifications;
drop table notify_state;
drop table routes;
drop table channels;

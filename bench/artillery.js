// Makes the events that artillery.yml posts.

'use strict';

const random = (from, to) => from + Math.floor(Math.random() * (to - from + 1));

function newEvent(request, context, events, done) {
  const secondsAgo = random(0, 3600);
  request.json = {
    device_id: `pi-${String(random(1, 5000)).padStart(5, '0')}`,
    timestamp: new Date(Date.now() - secondsAgo * 1000).toISOString(),
    total_files_synced: random(0, 500),
    total_errors: random(1, 10) === 1 ? random(1, 5) : 0,
    internet_speed: random(0, 10000) / 100,
  };
  return done();
}

module.exports = { newEvent };

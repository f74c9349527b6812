// Writes crates/server/tests/data/dotenv.json: texts of .env files, and what dotenv for Node reads in them.
// The Node service used dotenv 16, so PiSync reads its users' files as that does. Run it with:
//   (cd /tmp && npm install dotenv@16.6.1) && NODE_PATH=/tmp/node_modules node scripts/dotenv-cases.mjs [COUNT]
import { createRequire } from "node:module";
import { writeFileSync } from "node:fs";
const { parse } = createRequire(process.env.NODE_PATH + "/")("dotenv");

const chosen = [
  "", "\n\n", "# a comment\n  # another\n", "A=b", "A=b\n", "A=b\r\nC=d\r\n", "A=b\rC=d\r", "\ufeffA=b\nC=d",
  "export A=b", "  export   A=b", "export\tA=b", "exportA=b", "export A", "A : b", "A: b", "A:b", "A:\nB=c",
  "A = b", "A =b", "A= b ", " A=b", "\tA\t=\tb\t", "A=", "A= ", "A=\nB=c", "A=''", 'A=""', "A=``", "A", "A B=c",
  "A=b\nA=c", "A=b\nA=", "A=\nA=b", "=b", "A-B.C_D=e", "1=2", "Ä=b", "A=ä€😀", "A==b", "A=b=c",
  "A='b'", 'A="b"', "A=`b`", "A= 'b' ", "A=' b '", 'A=" b "', "A='b", "A=b'", "A='b\"", "A='it's'", 'A="say "hi""',
  'A="it\'s"', "A='say \"hi\"'", "A=`it's \"it\"`", "A='a`b'", "A=a'b'c", 'A=ab"c"d', "A='b'c", 'A="b"c', "A=\"b\" 'c'",
  "A=a\\b", "A=a\\\\b", "A=a\\nb", "A='a\\nb'", "A=`a\\nb`", 'A="a\\nb"', 'A="a\\rb\\tc"', 'A="a\\\\nb"', 'A="a\\"b"',
  "A='a\\'b'", "A=`a\\`b`", 'A="a\\', 'A="a\\nb', 'A="a\\nb"c', "A=$B", "A=${B}", "A='$B'", 'A="${B}"', "A=\\$B",
  "A=b#c", "A=b #c", "A=#b", "A= # b", "A='b#c'", "A='b' # c", "A='b'#c", 'A="b#c" # d', 'A="b # c', "A=b # 'c'",
  "A='b # c' d", "#A=b\nC=d", "A=b # c\nD=e", "A='b\nc'", 'A="b\nc"', "A=`b\nc`", 'A="b\r\nc"\r\nD=e', "A='b\nC=d\nE='f'",
  "A='b\nC=d\nE=it's", 'A="b\nC=d\n', "A=\n'b'", "A\n=b", "A=\n\n  'b'\nC=d", "A=b\n  \n\tC=d", "A=b\nodd line\nC=d",
  "A=b\n<<<<<<< HEAD\nC=d\n=======\nC=e\n>>>>>>> main", "A=b;C=d", "set A=b", "{\"A\": \"b\"}", "- A=b", "A=b\0c", "A=b\n\0\0\0",
  "DB_PASSWORD=p@ss:w/rd?&x=%20!*()[]{}|;~^", "DB_PASSWORD=a b c", "A=b\u00a0", "\u00a0A=b", "A=\u3000b", "A=b\vc", "A=\fb",
  "DATABASE_URL=postgres://u:p%40@h:5432/d?sslmode=require#x", "PORT=3000 # the port", "PORT='3000", "HOST=\"0.0.0.0\"  ",
];

// A generator of our own: the table must come out the same each time.
let state = 20261125;
const below = (count) => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return Math.floor((state / 2 ** 32) * count);
};
const pieces = ["A", "B", "=", "=", ":", " ", "'", '"', "`", "#", "\\", "n", "\n", "\n", "\r\n", "export ", "x", "\t", "A=", "\nB="];
const random = (length) => Array.from({ length }, () => pieces[below(pieces.length)]).join("");
const texts = [...chosen, ...Array.from({ length: Number(process.argv[2] ?? 500) }, () => random(1 + below(20)))];
const lines = texts.map((text) => JSON.stringify({ text, expected: parse(Buffer.from(text)) }));
const target = process.argv[3] ?? new URL("../crates/server/tests/data/dotenv.json", import.meta.url);
writeFileSync(target, "[\n" + lines.join(",\n") + "\n]\n");

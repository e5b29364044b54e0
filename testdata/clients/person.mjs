// The browser of clients that open one: goes to a URL, logs in as $PERSON, and
// follows where that leads, to the client's own callback. Usage: person.mjs URL
import { logIn } from './checks.mjs';

await logIn(process.argv[2], process.env.PERSON);

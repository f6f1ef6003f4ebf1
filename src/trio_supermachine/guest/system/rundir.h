#pragma once

/* Mount a fresh /run with the directories, but not the files, that the image has there: what
 * packages rely on is in place, and no stale pid file or socket is. NULL, or what failed. */
const char *mount_run(void);

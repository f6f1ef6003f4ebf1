/* The directory /run. */
#pragma once

/* Mount a fresh /run with the directories that the image has there, which packages rely on, but
 * without the files: a stale pid file or socket would mislead. NULL, or what failed, with errno. */
const char *mount_run(void);

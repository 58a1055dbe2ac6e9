/* Rows of several batches into one padded batch, in one pass over the memory. The slow twin is torch's index_select and
 * cat in rl_exit/models/backbones/rows.py; tests/models/test_rows.py holds them together.
 *
 * Plain C99; the arrays belong to the caller.
 */
#include <stdint.h>
#include <string.h>

typedef struct {
    const char *memory;   /* [., length, unit] bytes */
    int64_t length;       /* T of this batch */
    int64_t count;        /* how many of its rows are wanted */
    const int64_t *rows;  /* which; NULL: the first `count` */
} Source;

/* to [B,tokens,unit] bytes, B the sum of the counts: row r is the first lengths[r] <= tokens units of its source; the rest
 * of it is 0. */
void rl_exit_gather(int64_t sources, const Source *from, const int64_t *lengths, int64_t tokens, int64_t unit, char *to)
{
    const size_t whole = (size_t)(tokens * unit);
    for (const Source *s = from; s < from + sources; s++)
        for (int64_t i = 0; i < s->count; i++, to += whole) {
            const size_t real = (size_t)(*lengths++ * unit);
            memcpy(to, s->memory + (s->rows == NULL ? i : s->rows[i]) * s->length * unit, real);
            memset(to + real, 0, whole - real);
        }
}

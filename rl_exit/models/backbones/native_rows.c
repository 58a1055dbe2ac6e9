/* Rows of several batches into one padded batch, in one pass over the memory. The slow twin is torch's index_select and
 * cat in rl_exit/models/backbones/rows.py; tests/models/test_rows.py holds them together.
 *
 * Plain C99; the arrays belong to the caller.
 */
#include <stdint.h>
#include <string.h>

typedef struct {
    const char *memory;      /* [size, length, unit] bytes */
    int64_t size, length;    /* B and T of this batch */
    const int64_t *lengths;  /* real tokens of each of its rows, none above T */
    int64_t count;           /* how many of its rows are wanted */
    const int64_t *rows;     /* which; NULL: the first `count` */
} Source;

/* Of B rows, the sum of the counts: to [B,tokens,unit] bytes, the real units of each row, then 0; lengths [B]; and seen
 * [B,tokens], 1 at real tokens. A row without tokens keeps its first position, and is seen there. Returns the shortest
 * length, -1 where a row has more than `tokens`, -2 where there is no such row. */
int64_t rl_exit_gather(int64_t sources, const Source *from, int64_t tokens, int64_t unit, char *to, int64_t *lengths,
                       uint8_t *seen)
{
    const size_t whole = (size_t)(tokens * unit);
    int64_t shortest = tokens;
    for (const Source *s = from; s < from + sources; s++)
        for (int64_t i = 0; i < s->count; i++, to += whole, seen += tokens) {
            const int64_t row = s->rows == NULL ? i : s->rows[i];
            if (row < 0 || row >= s->size)
                return -2;
            const int64_t length = s->lengths[row], real = length > 0 ? length : 1;
            if (real > tokens)
                return -1;
            const size_t there = (size_t)((real < s->length ? real : s->length) * unit);
            memcpy(to, s->memory + row * s->length * unit, there);
            memset(to + there, 0, whole - there);
            memset(seen, 1, (size_t)real);
            memset(seen + real, 0, (size_t)(tokens - real));
            *lengths++ = length;
            if (length < shortest)
                shortest = length;
        }
    return shortest;
}

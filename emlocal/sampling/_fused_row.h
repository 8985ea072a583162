/* The row's way from logits to a token; included by _fused.c once for each width of vectors, in bytes.
 *
 * The mathematics is that of emlocal/em/split.py, emlocal/em/fast.py (the EM steps, in _fused_steps.h) and
 * emlocal/sampling/sampler.py, which say what the names mean.
 * Where a row is not of the usual kind, or the bound is not met, the answer is "no" and those modules take
 * the row. tests/sampling/test_fused.py holds this file against them and against the reference.
 */
#define F32 (WIDTH / 4)
#define F64 (WIDTH / 8)
typedef float FOR_WIDTH(floats) __attribute__((vector_size(WIDTH)));
typedef int32_t FOR_WIDTH(ints) __attribute__((vector_size(WIDTH)));
typedef uint32_t FOR_WIDTH(words) __attribute__((vector_size(WIDTH)));
typedef double FOR_WIDTH(doubles) __attribute__((vector_size(WIDTH)));
typedef int64_t FOR_WIDTH(longs) __attribute__((vector_size(WIDTH)));
typedef uint64_t FOR_WIDTH(quads) __attribute__((vector_size(WIDTH)));
#define floats FOR_WIDTH(floats)
#define ints FOR_WIDTH(ints)
#define words FOR_WIDTH(words)
#define doubles FOR_WIDTH(doubles)
#define longs FOR_WIDTH(longs)
#define quads FOR_WIDTH(quads)
#define either FOR_WIDTH(either)
#define load FOR_WIDTH(load)
#define load64 FOR_WIDTH(load64)
#define widened FOR_WIDTH(widened)
#define total FOR_WIDTH(total)
#define exp32 FOR_WIDTH(exp32)
#define exp64 FOR_WIDTH(exp64)
#define block_of FOR_WIDTH(block_of)
#define cover FOR_WIDTH(cover)
#define largest FOR_WIDTH(largest)
#define take_heavy FOR_WIDTH(take_heavy)
#define sweep FOR_WIDTH(sweep)
#define pad FOR_WIDTH(pad)
#define exponentiate FOR_WIDTH(exponentiate)
#define move FOR_WIDTH(move)
#define curvature FOR_WIDTH(curvature)
#define within_bound FOR_WIDTH(within_bound)
#define descend FOR_WIDTH(descend)
#define pull_back FOR_WIDTH(pull_back)
#define edge FOR_WIDTH(edge)
#define middle_of FOR_WIDTH(middle_of)
#define bin_tail FOR_WIDTH(bin_tail)
#define root FOR_WIDTH(root)
#define magnitude FOR_WIDTH(magnitude)
#define stride FOR_WIDTH(stride)
#define start_tail FOR_WIDTH(start_tail)
#define weigh_tail FOR_WIDTH(weigh_tail)
#define tail_turns FOR_WIDTH(tail_turns)
#define misplaced FOR_WIDTH(misplaced)
#define adam FOR_WIDTH(adam)
#define cooled FOR_WIDTH(cooled)
#define centre_at FOR_WIDTH(centre_at)
#define centre_of FOR_WIDTH(centre_of)
#define raise FOR_WIDTH(raise)
#define cool FOR_WIDTH(cool)
#define to_power FOR_WIDTH(to_power)
#define sharpen FOR_WIDTH(sharpen)
#define before FOR_WIDTH(before)
#define sift FOR_WIDTH(sift)
#define pop FOR_WIDTH(pop)
#define block_sums FOR_WIDTH(block_sums)
#define draw_whole FOR_WIDTH(draw_whole)
#define kept_in FOR_WIDTH(kept_in)
#define temperature_at FOR_WIDTH(temperature_at)
#define choose FOR_WIDTH(choose)
#define probability FOR_WIDTH(probability)
#define sample FOR_WIDTH(sample)

/* yes where the mask (of a comparison) is set, else no */
INLINE floats either(ints mask, floats yes, floats no)
{
    return (floats)((mask & (ints)yes) | (~mask & (ints)no));
}
INLINE floats load(const float *from)
{
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}
INLINE doubles load64(const double *from)
{
    doubles x;
    memcpy(&x, from, sizeof x);
    return x;
}
/* The lanes in float64, folded onto half as many. */
INLINE doubles widened(floats x)
{
    float lanes[F32];
    double folded[F64];
    memcpy(lanes, &x, sizeof x);
    for (int l = 0; l < F64; l++)
        folded[l] = (double)lanes[l] + (double)lanes[l + F64];
    return load64(folded);
}
INLINE double total(doubles x)
{
    double sum = 0;
    for (int l = 0; l < F64; l++)
        sum += x[l];
    return sum;
}

/* e^x for x ≤ 88 to 1.5 ulp; 0 below −87. */
INLINE floats exp32(floats x)
{
    const float magic = 12582912.0f; /* 1.5·2^23: adding it rounds to a whole number */
    floats t = x * 1.44269504f + magic, n = t - magic;
    floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    floats p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    p = (floats)((words)p + ((words)t << 23));
    return (floats)((ints)p & (x >= -87.0f));
}

/* e^x for x ≤ 700 to 2 ulp; 0 from −700 down. */
INLINE doubles exp64(doubles x)
{
    const double magic = 6755399441055744.0; /* 1.5·2^52 */
    static const double terms[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                                   1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0,        1.0};
    doubles t = x * 1.4426950408889634 + magic, n = t - magic;
    doubles r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    doubles p = r * (1.0 / 6227020800.0) + 1.0 / 479001600;
    for (int k = 0; k < 12; k++)
        p = p * r + terms[k];
    p = (doubles)((quads)p + ((quads)t << 52));
    return (doubles)((longs)p & (x > -700.0));
}

/* The block of tokens at `start`; the row's last block is padded with masked tokens. */
INLINE const float *block_of(const Row *row, Py_ssize_t start, float *padded)
{
    if (start + BLOCK <= row->V)
        return row->row + start;
    for (Py_ssize_t i = 0; i < BLOCK; i++)
        padded[i] = start + i < row->V ? row->row[start + i] : -INFINITY;
    return padded;
}

/* Put −inf for what is not legal. */
static void cover(Row *row)
{
    const floats nothing = (floats){0} - INFINITY;
    words lane;
    for (int l = 0; l < F32; l++)
        lane[l] = (uint32_t)l;
    for (Py_ssize_t start = 0; start < row->V; start += 64) {
        uint64_t bits = bits_at(row->mask, start, row->V);
        if (start + 64 > row->V)
            for (Py_ssize_t i = start; i < row->V; i++, bits >>= 1)
                row->covered[i] = bits & 1 ? row->row[i] : -INFINITY;
        else
            for (int i = 0; i < 64; i += F32) {
                words own = ((words){0} + (uint32_t)(bits >> i & ((1u << F32) - 1))) >> lane & 1;
                floats x = either(own != 0, load(row->row + start + i), nothing);
                memcpy(row->covered + start + i, &x, sizeof x);
            }
    }
    row->row = row->covered;
}

/* The row's largest logit; NaN if the row holds one. */
static float largest(const Row *row)
{
    float padded[BLOCK], top = -INFINITY;
    floats best[2] = {(floats){0} - INFINITY, (floats){0} - INFINITY};
    ints nan = {0};
    for (Py_ssize_t start = 0; start < row->V; start += BLOCK) {
        const float *from = block_of(row, start, padded);
        for (int i = 0; i < BLOCK; i += 2 * F32)
            for (int k = 0; k < 2; k++) {
                floats x = load(from + i + k * F32);
                nan |= x != x;
                best[k] = either(x > best[k], x, best[k]);
            }
    }
    for (int l = 0; l < F32; l++) {
        if (nan[l])
            return NAN;
        top = best[0][l] > top ? best[0][l] : top;
        top = best[1][l] > top ? best[1][l] : top;
    }
    return top;
}

/* Move the tokens of one block that are heavier than the cutoff to the head. */
INLINE void take_heavy(Row *row, Scratch *own, const float *x, Py_ssize_t start, float line)
{
    union {
        unsigned char of[BLOCK];
        uint64_t eight[BLOCK / 8];
    } heavy;
    for (int i = 0; i < BLOCK; i++)
        heavy.of[i] = x[i] > line;
    for (int eight = 0; eight < BLOCK / 8; eight++)
        if (heavy.eight[eight])
            for (int i = 8 * eight; i < 8 * eight + 8; i++)
                if (heavy.of[i]) {
                    own->id[row->n] = (int32_t)(start + i);
                    own->s[row->n++] = (double)x[i] - row->top;
                }
}

/* Split the row: head into `own`, sums of the tail into `row`. False if the head is too large. */
static int sweep(Row *row, Scratch *own)
{
    float padded[BLOCK];
    doubles M0 = {0}, M1 = {0}, Q0 = {0}, Q1 = {0}, Q2 = {0};
    const float line = (float)(row->top + log(CUTOFF));
    row->n = 0;
    for (Py_ssize_t start = 0; start < row->V; start += BLOCK) {
        const float *from = block_of(row, start, padded);
        floats m0 = {0}, m1 = {0}, q0 = {0}, q1 = {0}, q2 = {0};
        ints any = {0};
        for (int i = 0; i < BLOCK; i += F32) {
            floats x = load(from + i);
            ints over = x > line;
            any |= over;
            floats w = (floats)(~over & (ints)exp32(x));
            floats moment = w * either(x > -200.0f, x, (floats){0} - 200.0f); /* 0 where −inf */
            m0 += w;
            m1 += moment;
            q0 += w * w;
            q1 += w * moment;
            q2 += moment * moment;
        }
        M0 += widened(m0);
        M1 += widened(m1);
        Q0 += widened(q0);
        Q1 += widened(q1);
        Q2 += widened(q2);
        int32_t some = 0;
        for (int l = 0; l < F32; l++)
            some |= any[l];
        if (some && row->n + BLOCK > MAX_HEAD)
            return 0;
        if (some)
            take_heavy(row, own, from, start, line);
    }
    /* s = x − top */
    double m0 = total(M0), q0 = total(Q0), q1 = total(Q1), q2 = total(Q2);
    const double c = row->top, scale = row->scale, square = scale * scale;
    row->tail_mass = m0 * scale;
    row->tail_moment = (total(M1) - c * m0) * scale;
    row->Q0 = q0 * square;
    row->Q1 = (q1 - c * q0) * square;
    row->Q2 = (q2 - 2 * c * q1 + c * c * q0) * square;
    return 1;
}

/* Make an array's last lanes whole: exponents that weigh nothing. */
static void pad(double *h, Py_ssize_t n)
{
    for (; n % F64; n++)
        h[n] = -700.0;
}

/* w = e^h over n exponents, padded; Σ w and Σ w h. */
static void exponentiate(const double *h, double *w, Py_ssize_t n, double *mass, double *moment)
{
    doubles sum = {0}, product = {0};
    for (Py_ssize_t i = 0; i < n; i += F64) {
        doubles x = load64(h + i), weight = exp64(x);
        memcpy(w + i, &weight, sizeof weight);
        sum += weight;
        product += weight * x;
    }
    *mass = total(sum);
    *moment = total(product);
}

/* Position i before position j: the heavier token, of equals the lower id. */
INLINE int before(const double *t, int32_t i, int32_t j)
{
    return t[i] > t[j] || (t[i] == t[j] && i < j);
}

static void sift(int32_t *heap, Py_ssize_t size, Py_ssize_t at, const double *t)
{
    int32_t moving = heap[at];
    for (Py_ssize_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && before(t, heap[child + 1], heap[child]))
            child++;
        if (!before(t, heap[child], moving))
            break;
        heap[at] = heap[child];
    }
    heap[at] = moving;
}

/* Move the heap's first to its end; the next one comes up. */
static int32_t pop(int32_t *heap, Py_ssize_t *size, const double *t)
{
    int32_t first = heap[0];
    heap[0] = heap[--*size];
    heap[*size] = first;
    if (*size > 0)
        sift(heap, *size, 0, t);
    return first;
}

/* Weights of the tail, w^beta, summed by block; their sum, and that of w^beta · log w^beta. */
static double block_sums(Row *row, Scratch *own, double beta, double *moment)
{
    float padded[BLOCK];
    const float line = (float)(row->top + log(CUTOFF)), top = (float)row->top, sharp = (float)beta;
    doubles all = {0}, moments = {0};
    for (Py_ssize_t start = 0, b = 0; start < row->V; start += BLOCK, b++) {
        const float *from = block_of(row, start, padded);
        floats sum = {0}, product = {0};
        for (int i = 0; i < BLOCK; i += F32) {
            floats x = load(from + i), s = (x - top) * sharp;
            floats w = (floats)(~(x > line) & (ints)exp32(s));
            sum += w;
            product += w * either(s > -200.0f, s, (floats){0} - 200.0f); /* 0 where −inf */
        }
        doubles wide = widened(sum);
        own->blocks[b] = total(wide);
        all += wide;
        moments += widened(product);
    }
    row->blocks_beta = beta;
    *moment = total(moments);
    return row->blocks_mass = total(all);
}

#include "_fused_steps.h"

/* Inverse CDF in token order over the whole row, at weights t of the head and factor·w^beta of the tail. */
static int32_t draw_whole(Row *row, Scratch *own, double beta, double factor, double u)
{
    Py_ssize_t blocks = (row->V + BLOCK - 1) / BLOCK, chosen = -1, next = 0, first = 0;
    double all = 0, seen = 0, below = 0;
    for (Py_ssize_t i = 0; i < row->n; i++)
        all += own->t[i];
    for (Py_ssize_t b = 0; b < blocks; b++)
        all += own->blocks[b] * factor;
    for (Py_ssize_t b = 0; b < blocks; b++) {
        double sum = own->blocks[b] * factor;
        Py_ssize_t from = next;
        for (; next < row->n && own->id[next] < (b + 1) * BLOCK; next++)
            sum += own->t[next];
        if (sum > 0) { /* the last that can be drawn, should u·Σ round up to Σ */
            chosen = b;
            below = seen;
            first = from;
        }
        seen += sum;
        if (seen > u * all)
            break;
    }
    double target = u * all - below, cumulative = 0;
    int32_t token = -1;
    for (Py_ssize_t i = chosen * BLOCK; i < row->V && i < (chosen + 1) * BLOCK; i++) {
        int held = first < row->n && own->id[first] == i;
        double weight = held ? own->t[first++] : exp((row->row[i] - row->top) * beta) * factor;
        cumulative += weight;
        if (weight > 0)
            token = (int32_t)i;
        if (cumulative > target)
            break;
    }
    return token;
}

/* Whether truncation keeps position i: min-p, and rank no later than `last` where that is known (≥ 0). */
INLINE int kept_in(const double *t, int32_t i, int32_t last, double min_p)
{
    return t[i] >= min_p && t[i] > 0 && (last < 0 || !before(t, last, i));
}

/* SamplingParams.temperature_at */
static double temperature_at(const Settings *set, double entropy, Py_ssize_t V)
{
    if (set->dynatemp_range == 0 || V == 1)
        return set->temperature;
    double low = fmax(0.0, set->temperature - set->dynatemp_range), share = fmin(1.0, entropy / log((double)V));
    return low + (set->temperature + set->dynatemp_range - low) * pow(share, set->dynatemp_exponent);
}

/* Temperature, top-k, top-p, min-p and the draw: a token id, or −1 where tokens of the tail matter. */
static int32_t choose(Row *row, Scratch *own, const Sharpened *from, const Settings *set)
{
    const double *h = from->head;
    double *t = own->t, top = -INFINITY, mass = 0, moment;
    Py_ssize_t n = row->n, size = n;
    int32_t heaviest = 0, last = -1;
    for (Py_ssize_t i = 0; i < n; i++)
        if (h[i] > top) {
            top = h[i];
            heaviest = (int32_t)i;
        }
    double temperature = temperature_at(set, from->entropy, row->vocabulary);
    if (temperature == 0)
        return own->id[heaviest];
    double beta = 1 / fmax(temperature, COLDEST);
    for (Py_ssize_t i = 0; i < n; i++)
        own->g[i] = (h[i] - top) * beta;
    pad(own->g, n);
    exponentiate(own->g, t, n, &mass, &moment);
    double power = from->tail_power * beta, unused;
    double scale = exp(fmin((log(from->tail_factor) - top) * beta, 700.0));
    double tail_most = scale * pow(CUTOFF, power); /* no tail token weighs more */
    double tail = 0, kept = mass, doubt = 0; /* doubt: what top-k may keep of the tail */
    int by_rank = 0 < set->top_k && set->top_k < row->V;
    if (set->min_p > tail_most && set->top_p >= 1 && !by_rank)
        ; /* the usual settings: the tail is cut off, whatever it weighs */
    else if (power == 1)
        tail = scale * row->tail_mass;
    else if (power < 1 || scale * pow(CUTOFF, power - 1) * row->tail_mass > NEGLIGIBLE)
        tail = scale * (row->blocks_beta == power ? row->blocks_mass : block_sums(row, own, power, &unused));

    if (by_rank || set->top_p < 1) {
        for (int32_t i = 0; i < n; i++)
            own->order[i] = i;
        for (Py_ssize_t i = n / 2; i-- > 0;)
            sift(own->order, n, i, t);
    }
    if (by_rank) {
        Py_ssize_t k = set->top_k < n ? set->top_k : n;
        kept = 0;
        while (n - size < k) {
            last = pop(own->order, &size, t);
            kept += t[last];
        }
        if (k < set->top_k || t[last] <= tail_most)
            doubt = tail > NEGLIGIBLE ? tail : 0;
        if (doubt > 0 && set->top_p >= 1 && set->min_p <= tail_most)
            return -1;
        tail = 0;
    }
    if (set->top_p < 1) {
        double goal = set->top_p * (kept + tail), at_most = set->top_p * (kept + tail + doubt), cumulative = 0;
        Py_ssize_t ranked = by_rank ? n - size : n;
        if (kept < at_most)
            return -1;
        for (Py_ssize_t rank = 0; rank < ranked && !(rank && cumulative >= goal); rank++) {
            last = by_rank ? own->order[n - 1 - rank] : pop(own->order, &size, t);
            cumulative += t[last];
        }
        if (doubt > 0 && cumulative < at_most)
            return -1;
        tail = 0;
    }
    if (set->min_p > 0) {
        if (set->min_p <= tail_most && tail != 0)
            return -1;
        tail = 0;
    }
    if (tail > NEGLIGIBLE * mass) {
        if (from->uneven)
            return -1;
        if (row->blocks_beta != power)
            block_sums(row, own, power, &unused);
        return draw_whole(row, own, power, scale, set->u);
    }
    double all = 0, cumulative = 0;
    for (int32_t i = 0; i < n; i++)
        if (kept_in(t, i, last, set->min_p)) {
            all += t[i];
            heaviest = i; /* the last that can be drawn, should u·Σ round up to Σ */
        }
    for (int32_t i = 0; i < n; i++)
        if (kept_in(t, i, last, set->min_p) && (cumulative += t[i]) > set->u * all)
            return own->id[i];
    return own->id[heaviest];
}

/* The token's probability before temperature and truncation. */
static double probability(const Row *row, const Scratch *own, const Sharpened *from, int32_t token)
{
    Py_ssize_t low = 0, high = row->n;
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        if (own->id[middle] < token)
            low = middle + 1;
        else
            high = middle;
    }
    if (low < row->n && own->id[low] == token)
        return exp(from->head[low]) / from->partition;
    return from->tail_factor * exp((row->row[token] - row->top) * from->tail_power) / from->partition;
}

/* The whole way; false where the row is for the other modules. */
static int sample(Row *row, Scratch *own, const Settings *set, Drawn *out)
{
    double mass, moment;
    Sharpened after;
    if (row->mask)
        cover(row);
    float top = largest(row);
    if (!(LOWEST_TOP < top && top < HIGHEST_TOP))
        return 0;
    row->top = top;
    row->scale = exp(-(double)top);
    if (!sweep(row, own))
        return 0;
    pad(own->s, row->n);
    exponentiate(own->s, own->w, row->n, &mass, &moment);
    row->partition = mass + row->tail_mass;
    row->entropy = fmax(0.0, log(row->partition) - (moment + row->tail_moment) / row->partition);
    Sharpened plain = {own->s, 1.0, 1.0, 0, row->tail_mass, row->partition, row->entropy, 0};
    if (!sharpen(row, own, set, &plain, &after))
        return 0;
    if ((out->token = choose(row, own, &after, set)) < 0)
        return 0;
    out->without = after.steps ? choose(row, own, &plain, set) : out->token;
    out->p_before = probability(row, own, &plain, out->token);
    out->p_after = probability(row, own, &after, out->token);
    out->entropy_before = plain.entropy;
    out->entropy_after = after.entropy;
    out->steps = after.steps;
    return out->without >= 0;
}

#undef F32
#undef F64
#undef floats
#undef ints
#undef words
#undef doubles
#undef longs
#undef quads
#undef either
#undef load
#undef load64
#undef widened
#undef total
#undef exp32
#undef exp64
#undef block_of
#undef cover
#undef largest
#undef take_heavy
#undef sweep
#undef pad
#undef exponentiate
#undef move
#undef curvature
#undef within_bound
#undef descend
#undef pull_back
#undef edge
#undef middle_of
#undef bin_tail
#undef root
#undef magnitude
#undef stride
#undef start_tail
#undef weigh_tail
#undef tail_turns
#undef misplaced
#undef adam
#undef cooled
#undef centre_at
#undef centre_of
#undef raise
#undef cool
#undef to_power
#undef sharpen
#undef Bins
#undef Stride
#undef Tail
#undef TAIL
#undef Cooled
#undef Centre
#undef before
#undef sift
#undef pop
#undef block_sums
#undef draw_whole
#undef kept_in
#undef temperature_at
#undef choose
#undef probability
#undef sample

/* The EM steps of one split row; included by _fused_row.h, once for each width of vectors.
 *
 * The mathematics, and the proofs of the bounds, are in the docstring of emlocal/em/fast.py. Where it takes
 * the tail as one, this file may look at it again, token by token: a sweep costs little here. Each step is 0
 * where agreement with the reference cannot be promised.
 */

/* h += rate·g with g = w (h + c), padded; inner products gram = {w·w, w·g, g·g}. */
static void move(double *h, const double *w, Py_ssize_t n, double c, double rate, double gram[3])
{
    doubles ww = {0}, wg = {0}, gg = {0};
    for (Py_ssize_t i = 0; i < n; i += F64) {
        doubles x = load64(h + i), weight = load64(w + i), g = weight * (x + c);
        ww += weight * weight;
        wg += weight * g;
        gg += g * g;
        x += rate * g;
        memcpy(h + i, &x, sizeof x);
    }
    gram[0] = total(ww);
    gram[1] = total(wg);
    gram[2] = total(gg);
}

/* h += pull·(p⁰ − w/S), padded: the KL term's part of a step. Where the largest h is then. */
static Py_ssize_t pull_back(double *h, const double *w, const double *s, Py_ssize_t n, double pull, double S0,
                            double S)
{
    Py_ssize_t top = 0;
    for (Py_ssize_t i = 0; i < n; i += F64) {
        doubles x = load64(h + i) + pull * (exp64(load64(s + i)) / S0 - load64(w + i) / S);
        memcpy(h + i, &x, sizeof x);
    }
    for (Py_ssize_t i = 1; i < n; i++)
        top = h[i] > h[top] ? i : top;
    return top;
}

/* λ and μ: between them lies the curvature of −H. */
static void curvature(double p1, double H, const double gram[3], double S, double *high, double *low)
{
    double pp = gram[0] / (S * S), pg = gram[1] / (S * S), gg = gram[2] / (S * S);
    double a1 = log(p1) + H, d1 = p1 * (a1 + 1), x1 = p1 * (a1 + 0.5);
    double p2 = fmin(p1, 1 - p1), d2 = p2 > 0 ? fmax(0.0, p2 * (log(p2) + H + 1)) : 0.0;
    double xy = pg + pp / 2, norms = sqrt(fmax(0.0, gg + pg + pp / 4) * pp);
    double alpha = norms > 0 ? sqrt(pp / norms) : 1.0;
    double u1 = alpha * x1 + p1 / alpha, rest = sqrt(fmax(0.0, 2 * (norms + xy) - u1 * u1));
    double top = d1 - u1 * u1 / 2, coupling = u1 * rest, other = -exp(-H - 2) - rest * rest / 2;
    *high = fmax(0.0, (top + d2 + hypot(top - d2, coupling)) / 2) + norms - xy;
    *low = (top + other - hypot(top - other, coupling)) / 2;
}

/* Whether what the tail's expansion leaves out can be forgiven; K: the most that the KL term moved it. */
static int within_bound(const Row *row, const Settings *set, double A, double B, double K, double S,
                        double amplified, double undecided)
{
    double log_c = log(CUTOFF), U = CUTOFF * (fabs(A * log_c + B) + K), growth = exp(fmin(U, 50.0));
    double b0 = fabs(A * row->Q1 + B * row->Q0), b1 = fabs(A * row->Q2 + B * row->Q1);
    double q = A * A * row->Q2 + 2 * A * B * row->Q1 + B * B * row->Q0 + K * (2 * b0 + K * row->Q0);
    double log_V = log((double)row->V), pull = set->learning_rate * set->kl_weight;
    b0 += K * row->Q0;
    b1 -= K * row->Q1;
    double nu = growth * (CUTOFF * q / 2 + 2 * U * b0) / S + ROUNDING * row->tail_mass / S;
    double nu_moment = growth * (CUTOFF * (1 - log_c) * q + 2 * U * (b0 + b1)) / S;
    nu_moment += ROUNDING * fabs(row->tail_moment) / S;
    double delta_H = nu_moment + nu * (1 + 2 * log_V);
    double rounding = ROUNDING64 * (1 + set->learning_rate + pull);
    double error = amplified * (set->learning_rate * (nu + delta_H) + rounding);
    int in_doubt = set->threshold > 0 && undecided <= delta_H + error * (1 + log_V) + 1e-12;
    return !in_doubt && error / 2 + 2 * b0 / S <= TOLERANCE;
}

/* EM-INF by gradient descent. */
static int descend(const Row *row, Scratch *own, const Settings *set, Sharpened *out)
{
    double eta = set->learning_rate, pull = eta * set->kl_weight;
    double A = 0, B = 0, K = 0, largest_K = 0, amplified = 0, undecided = INFINITY;
    double tail_mass = row->tail_mass, tail_moment = row->tail_moment, least_S = row->partition;
    double mass, moment, S, H, gram[3], high, low;
    Py_ssize_t n = row->n, top = 0;
    int step = 0;
    memcpy(own->h, own->s, (size_t)n * sizeof(double));
    pad(own->h, n);
    while (own->h[top] != 0)
        top++;
    for (;; step++) {
        exponentiate(own->h, own->w, n, &mass, &moment);
        S = mass + tail_mass;
        double log_S = log(S);
        H = fmax(0.0, log_S - (moment + tail_moment) / S);
        least_S = fmin(least_S, S);
        undecided = fmin(undecided, fabs(H - set->threshold));
        if (set->threshold > H || step == set->steps)
            break;
        double rate = eta / S, c = H - log_S, p1 = own->w[top] / S;
        move(own->h, own->w, n, c, rate, gram);
        curvature(p1, H, gram, S, &high, &low);
        amplified = amplified * fmax(1 + eta * high + pull / 2, pull / 2 - eta * low - 1) + 1;
        A += rate;
        B += rate * c;
        if (pull > 0) {
            top = pull_back(own->h, own->w, own->s, n, pull, row->partition, S);
            K += pull * (1 / row->partition - 1 / S);
            largest_K = fmax(largest_K, fabs(K));
        }
        tail_mass = row->tail_mass + A * row->Q1 + (B + K) * row->Q0;
        tail_moment = row->tail_moment + A * (row->Q2 + row->Q1) + (B + K) * (row->Q1 + row->Q0);
        if (!(own->h[top] <= HIGHEST) || !(tail_mass >= 0))
            return 0;
    }
    if (!within_bound(row, set, A, B, largest_K, least_S, amplified, undecided))
        return 0;
    double factor = row->tail_mass > 0 ? tail_mass / row->tail_mass : 1.0;
    *out = (Sharpened){own->h, factor, 1.0, 0, tail_mass, S, H, step};
    return 1;
}

/* The tail by exponent: bin k holds the tokens with edge(k) ≥ s > edge(k + 1); the last one, all below. */
typedef struct {
    double mass[BINS], mean[BINS]; /* Σ w, and the mean exponent */
} FOR_WIDTH(Bins);
#define Bins FOR_WIDTH(Bins)

static double edge(int k)
{
    return log(CUTOFF) - EDGES[k];
}

static double middle_of(int k)
{
    return k < BINS - 1 ? (edge(k) + edge(k + 1)) / 2 : edge(k);
}

static void bin_tail(const Row *row, Bins *bins)
{
    enum { MANY = 8 * BLOCK }; /* tokens whose weights are summed in float32 */
    doubles mass[BINS] = {{0}}, moment[BINS] = {{0}};
    float padded[BLOCK], s[MANY], w[MANY];
    const float line = (float)(row->top + log(CUTOFF)), top = (float)row->top;
    const floats least = (floats){0} - 200.0f;
    for (Py_ssize_t start = 0; start < row->V; start += MANY) {
        int count = 0;
        for (; count < MANY && start + count < row->V; count += BLOCK) {
            const float *from = block_of(row, start + count, padded);
            for (int i = 0; i < BLOCK; i += F32) {
                floats x = load(from + i), exponent = either(x - top > least, x - top, least);
                floats weight = (floats)(~(x > line) & (ints)exp32(exponent));
                memcpy(s + count + i, &exponent, sizeof exponent);
                memcpy(w + count + i, &weight, sizeof weight);
            }
        }
        for (int k = 0; k < BINS; k++) {
            const float upper = k ? (float)edge(k) : INFINITY;
            const float lower = k < BINS - 1 ? (float)edge(k + 1) : -INFINITY;
            const float middle = (float)middle_of(k);
            /* four of each, so that an addition need not wait for the one before */
            floats sum[4] = {{0}}, product[4] = {{0}};
            for (int i = 0; i < count; i += 4 * F32)
                for (int l = 0; l < 4; l++) {
                    floats exponent = load(s + i + l * F32);
                    ints within = (exponent <= upper) & (exponent > lower);
                    floats weight = (floats)(within & (ints)load(w + i + l * F32));
                    sum[l] += weight;
                    product[l] += weight * (exponent - middle);
                }
            mass[k] += widened(sum[0] + sum[1] + (sum[2] + sum[3]));
            moment[k] += widened(product[0] + product[1] + (product[2] + product[3]));
        }
    }
    for (int k = 0; k < BINS; k++) {
        double m = total(mass[k]), beside = m > 0 ? total(moment[k]) / m : 0;
        bins->mass[k] = m;
        bins->mean[k] = fmin(edge(k), middle_of(k) + beside);
    }
}

/* What of an Adam step is the same for all tokens. */
typedef struct {
    double S, S0, H, delta; /* delta: the error of H */
    int count;              /* of steps, with this one */
} FOR_WIDTH(Stride);
#define Stride FOR_WIDTH(Stride)

INLINE doubles root(doubles x)
{
    for (int l = 0; l < F64; l++)
        x[l] = __builtin_sqrt(x[l]);
    return x;
}
INLINE doubles magnitude(doubles x)
{
    return (doubles)((longs)x & INT64_MAX);
}

/* One Adam step of the tokens [0, n), padded, and of the errors of their logits; w = e^h, first = e^s. */
static void stride(const Moments *of, double *h, const double *w, const double *s, Py_ssize_t n,
                   const Settings *set, const Stride *at)
{
    const double eta = set->learning_rate, kappa = set->kl_weight, c = at->H - log(at->S);
    const double unbias1 = 1 / (1 - pow(ADAM1, at->count)), unbias2 = 1 / (1 - pow(ADAM2, at->count));
    for (Py_ssize_t i = 0; i < n; i += F64) {
        doubles x = load64(h + i), p = load64(w + i) / at->S, a = x + c, off = load64(of->off + i);
        doubles g = -p * a;
        if (kappa > 0)
            g += kappa * (p - exp64(load64(s + i)) / at->S0);
        doubles mean = load64(of->mean + i), square = load64(of->square + i);
        mean += (1 - ADAM1) * (g - mean);
        square += (1 - ADAM2) * (g * g - square);
        doubles rms = root(square * unbias2) + ADAM_EPSILON, u = mean * unbias1 / rms;
        x -= eta * u;
        doubles dg = p * (at->delta + ROUNDING64 + magnitude((a + (1 - kappa)) * off));
        doubles dmean = load64(of->dmean + i), dsquare = load64(of->dsquare + i);
        dmean += (1 - ADAM1) * (dg - dmean);
        dsquare += (1 - ADAM2) * (2 * g * dg - dsquare);
        off += eta * (dmean * unbias1 - u * dsquare * unbias2 / (2 * rms)) / rms;
        memcpy(h + i, &x, sizeof x);
        memcpy(of->off + i, &off, sizeof x);
        memcpy(of->mean + i, &mean, sizeof x);
        memcpy(of->square + i, &square, sizeof x);
        memcpy(of->dmean + i, &dmean, sizeof x);
        memcpy(of->dsquare + i, &dsquare, sizeof x);
    }
}

/* Pseudo tokens of the tail: the bins' means, then their edges. They take the steps of real tokens, ε of Adam
 * included: what a step does to a token depends on its exponent alone. */
#define TAIL ((2 * BINS + 7) / 8 * 8)
typedef struct {
    Bins bins;
    double s[TAIL], h[TAIL], w[TAIL], moments[5][TAIL];
    double tokens[BINS];   /* how many of a bin's mean would weigh as much as it */
    double mass, moment;   /* Σ w and Σ w h of the tail's tokens */
    double stray, deep;    /* bounds on the errors of both */
    double error, uneven;  /* Σ w |error of h|; the mass that one common factor for the tail would misplace */
} FOR_WIDTH(Tail);
#define Tail FOR_WIDTH(Tail)

static void start_tail(const Row *row, Tail *tail)
{
    bin_tail(row, &tail->bins);
    for (int k = 0; k < TAIL; k++)
        tail->s[k] = k < BINS ? tail->bins.mean[k] : k < 2 * BINS ? edge(k - BINS) : -700.0;
    for (int k = 0; k < BINS; k++)
        tail->tokens[k] = tail->bins.mass[k] * exp(-tail->s[k]);
    memcpy(tail->h, tail->s, sizeof tail->h);
    memset(tail->moments, 0, sizeof tail->moments);
}

/* Sums of the tail, where no token moves by more than `most`.
 *
 * A token of bin k moves by u(s), its mean by u(s̄). They differ by r at most: as far as the edges, and twice as
 * far as the mean lies beside the line between the edges. In Σ w these differences cancel to first order, as far
 * as u is straight, since Σ w (s − s̄) = 0. In Σ w h they leave twice r/width · Σ w (s − s̄)², and Σ w (s − s̄)² is
 * at most Σ w · width²/4. Below the last edge nobody looks. */
static void weigh_tail(const Row *row, Tail *tail, double most)
{
    const double *h = tail->h, *s = tail->s, *mass = tail->bins.mass;
    double after[BINS], unused;
    exponentiate(h, tail->w, TAIL, &unused, &unused);
    tail->mass = tail->moment = tail->stray = tail->deep = tail->error = tail->uneven = 0;
    for (int k = 0; k < BINS; k++) {
        double own = h[k] - s[k], upper = h[BINS + k] - s[BINS + k], r = most, bend = most, width = 100;
        if (k < BINS - 1) {
            double lower = h[BINS + k + 1] - s[BINS + k + 1];
            width = edge(k) - edge(k + 1);
            bend = 2 * fabs(own - upper - (upper - lower) / width * (s[k] - edge(k)));
            r = fabs(upper - lower) + bend;
        }
        double growth = r < 0.05 ? 1.06 : exp(r), far = r * growth; /* e^r − 1 ≤ r e^r */
        double beside = r * far / 2 + bend + ROUNDING_BINS;
        after[k] = tail->tokens[k] * tail->w[k];
        tail->mass += after[k];
        tail->moment += after[k] * h[k];
        tail->stray += after[k] * beside;
        tail->deep += after[k] * (beside * fabs(h[k]) + far * (width / 2 + r));
        tail->error += after[k] * fmin(fabs(tail->moments[4][k]), most);
        tail->uneven += after[k] * far;
    }
    double factor = row->tail_mass > 0 ? tail->mass / row->tail_mass : 1.0;
    for (int k = 0; k < BINS; k++)
        tail->uneven += fabs(after[k] - factor * mass[k]) / 2;
}

/* Whether the KL term would make a token of the tail rise. */
static int tail_turns(const Tail *tail, double c, double kappa, double swelling)
{
    for (int k = 0; kappa > 0 && k < 2 * BINS; k++)
        if (-(tail->h[k] + c) + kappa * (1 - exp(tail->s[k] - tail->h[k]) * swelling) < 0)
            return 1;
    return 0;
}

/* Σ w · |error of h|, padded; no error counts as more than `most`. */
static double misplaced(const double *w, const double *off, Py_ssize_t n, double most)
{
    doubles sum = {0}, limit = (doubles){0} + most;
    for (Py_ssize_t i = 0; i < n; i += F64) {
        doubles error = magnitude(load64(off + i));
        longs over = ~(error < limit); /* also NaN */
        sum += load64(w + i) * (doubles)((over & (longs)limit) | (~over & (longs)error));
    }
    return total(sum);
}

/* EM-INF by Adam. */
static int adam(const Row *row, Scratch *own, const Settings *set, Sharpened *out)
{
    Tail tail;
    const Moments heads = {own->moments[0], own->moments[1], own->moments[2], own->moments[3], own->moments[4]};
    const Moments tails = {tail.moments[0], tail.moments[1], tail.moments[2], tail.moments[3], tail.moments[4]};
    Py_ssize_t n = row->n, padded = (n + F64 - 1) / F64 * F64;
    double S0 = row->partition, mass, moment;
    memcpy(own->h, own->s, (size_t)n * sizeof(double));
    pad(own->h, n);
    for (int k = 0; k < 5; k++)
        memset(own->moments[k], 0, (size_t)padded * sizeof(double));
    start_tail(row, &tail);
    for (int step = 0;; step++) {
        double most = 2 * set->learning_rate * step; /* a token moves by little more than η a step */
        exponentiate(own->h, own->w, n, &mass, &moment);
        weigh_tail(row, &tail, most);
        double S = mass + tail.mass, H = fmax(0.0, log(S) - (moment + tail.moment) / S);
        double error = (tail.error + misplaced(own->w, heads.off, n, most)) / S;
        double stray = tail.stray / S, depth = tail.mass > 0 ? fabs(tail.moment / tail.mass) : 0.0;
        double rounding = ROUNDING * tail.mass / S * (2 + depth + H);
        double delta = stray * (2 + H) + tail.deep / S + rounding + error * (1 + H);
        int undecided = set->threshold > 0 && fabs(H - set->threshold) <= delta + 1e-12;
        if (undecided || !(error + stray <= TOLERANCE))
            return 0;
        if (set->threshold > H || step == set->steps) {
            double factor = row->tail_mass > 0 ? tail.mass / row->tail_mass : 1.0;
            int uneven = error + stray + tail.uneven / S > TOLERANCE;
            *out = (Sharpened){own->h, factor, 1.0, uneven, tail.mass, S, H, step};
            return 1;
        }
        if (tail_turns(&tail, H - log(S), set->kl_weight, S / S0))
            return 0;
        const Stride at = {S, S0, H, delta, step + 1};
        stride(&heads, own->h, own->w, own->s, n, set, &at);
        stride(&tails, tail.h, tail.w, tail.s, TAIL, set, &at);
        for (Py_ssize_t i = 0; i < n; i++)
            if (!(own->h[i] <= HIGHEST))
                return 0;
    }
}

/* Where the tail was summed: Σ w^β and the mean of s under w^β. */
typedef struct {
    double beta, mass, mean;
} FOR_WIDTH(Centre);
#define Centre FOR_WIDTH(Centre)

/* The row at the inverse temperature β. */
typedef struct {
    double H, variance, tail, S, bound;
} FOR_WIDTH(Cooled);
#define Cooled FOR_WIDTH(Cooled)

/* With δ = β − β_c, Σ w^β is Σ w^β_c e^δs. That lies above e^δs at the mean s (Jensen), and below the chord
 * between the ends of s (Edmundson and Madansky). */
static Cooled cooled(const Row *row, const Scratch *own, double beta, const Centre *centre)
{
    double delta = beta - centre->beta, s = centre->mean;
    double upper = log(CUTOFF), lower = -87 / fmin(beta, centre->beta);
    double low = exp(delta * s);
    double high = ((upper - s) * exp(delta * lower) + (s - lower) * exp(delta * upper)) / (upper - lower);
    double tail = centre->mass * (low + high) / 2, x = beta * s;
    double width = centre->mass * (high - low) / 2 + tail * (centre->beta == 1 ? ROUNDING : ROUNDING_COOLED);
    doubles sum = {0}, first = {0}, second = {0};
    for (Py_ssize_t i = 0; i < row->n; i += F64) {
        doubles h = load64(own->s + i) * beta, w = exp64(h);
        sum += w;
        first += w * h;
        second += w * h * h;
    }
    double S = total(sum) + tail, mean = (total(first) + tail * x) / S;
    double variance = fmax(0.0, (total(second) + tail * x * x) / S - mean * mean);
    double delta_H = width / S * (1 + fabs(x) + fabs(log(S)));
    double bound = width / S + delta_H / (2 * sqrt(fmax(variance, 1e-30)));
    return (Cooled){fmax(0.0, log(S) - mean), variance, tail, S, bound};
}

/* The tail, summed again at β. */
static Centre centre_at(Row *row, Scratch *own, double beta)
{
    double moment, mass = block_sums(row, own, beta, &moment);
    return (Centre){beta, mass, mass > 0 ? fmin(moment / mass / beta, log(CUTOFF)) : log(CUTOFF)};
}

static Centre centre_of(const Row *row)
{
    double mean = row->tail_mass > 0 ? row->tail_moment / row->tail_mass : log(CUTOFF);
    return (Centre){1, row->tail_mass, fmin(mean, log(CUTOFF))};
}

/* The row to the power β; own->h = β s. */
static void raise(const Row *row, Scratch *own, double beta, const Cooled *at, Sharpened *out)
{
    for (Py_ssize_t i = 0; i < row->n; i++)
        own->h[i] = own->s[i] * beta;
    *out = (Sharpened){own->h, 1.0, beta, 0, at->tail, at->S, at->H, 1};
}

/* Adaptive temperature: Newton's method for x = log β, within bounds that the bisection keeps. */
static int cool(Row *row, Scratch *own, double target, Sharpened *out)
{
    double x = 0.5;
    Centre centre = centre_of(row);
    for (int sweeps = 0; sweeps < 4; sweeps++) {
        double low = 0, high = -log(COLDEST_EM);
        Cooled at = {0};
        for (int round = 0; round < 100; round++) {
            at = cooled(row, own, exp(x), &centre);
            *(target < at.H ? &low : &high) = x;
            double newton = at.variance > 0 ? x + (at.H - target) / at.variance : INFINITY;
            double step = low < newton && newton < high ? newton : (low + high) / 2;
            if (fabs(step - x) <= 1e-9 || high - low <= 1e-9)
                break;
            x = step;
        }
        if (at.bound <= TOLERANCE) {
            raise(row, own, exp(x), &at, out);
            return 1;
        }
        centre = centre_at(row, own, exp(x));
    }
    return 0;
}

/* p^α. */
static int to_power(Row *row, Scratch *own, double alpha, Sharpened *out)
{
    Centre centre = centre_of(row);
    for (int sweeps = 0; sweeps < 2; sweeps++) {
        Cooled at = cooled(row, own, alpha, &centre);
        if (at.bound <= TOLERANCE) {
            raise(row, own, alpha, &at, out);
            return 1;
        }
        centre = centre_at(row, own, alpha);
    }
    return 0;
}

/* The row after the EM step, or as it is. */
static int sharpen(Row *row, Scratch *own, const Settings *set, const Sharpened *plain, Sharpened *out)
{
    double H = row->entropy, target = fmax(set->alpha * H, set->threshold);
    int one_hot = row->n == 1 && row->tail_mass == 0;
    switch (set->kind) {
    case DESCENT:
    case ADAM:
        if (one_hot || set->steps == 0 || set->threshold > H + DOUBT)
            break;
        if ((set->kind == ADAM ? adam : descend)(row, own, set, out))
            return out->steps == 0 ||
                   set->temperature + set->dynatemp_range <= (set->kind == ADAM ? HOTTEST_ADAM : HOTTEST);
        return 0;
    case COOLING:
        if (H <= target)
            break;
        return cool(row, own, target, out);
    case POWER:
        return to_power(row, own, set->alpha, out);
    }
    *out = *plain;
    return 1;
}

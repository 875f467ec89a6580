# x'' = -stiffness x - damping x', against a stiffness of 4 and a damping of 0.3: the mean square difference over 5 s
BEGIN {
    dt = 0.01
    x = y = 1
    for (k = 0; k < 500; k++) {
        v += dt * (-({stiffness}) * x - ({damping}) * v)
        x += dt * v
        w += dt * (-4 * y - 0.3 * w)
        y += dt * w
        sum += (x - y) ^ 2
    }
    printf "loss = %.15g\n", sum / 500
}
